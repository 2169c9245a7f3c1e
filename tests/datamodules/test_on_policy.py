"""Rollouts: in which order they are learned from, and what goes on from a checkpoint."""

from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from datamodules.environments.gymnasium import GymnasiumEnv
from datamodules.on_policy import OnPolicyDataModule

SIZES = {"num_envs": 3, "rollout_steps": 8, "epochs": 2, "updates_per_step": 6}


class Counting:
    """A second method of the contract: it numbers the transitions, and carries how many rollouts each row had."""

    device = torch.device("cpu")
    updates, total_updates = 0, 1000

    def __init__(self):
        self.rollouts, self.env_steps, self.tallied = [], 0, {}

    def policy(self, exploring=False):
        assert exploring
        return TensorDictModule(lambda seen: torch.tanh(seen[:, :1]), ["observation"], ["action"])

    def advance(self, env_steps):
        self.env_steps = env_steps

    def tally(self, names, values, count):
        for name, value in zip(names, values.tolist()):
            self.tallied.setdefault(name, []).append((value, count))

    def prepare(self, rollout, carried):
        self.rollouts.append(rollout.clone())
        number = torch.arange(rollout.numel())
        return TensorDict({"number": number}, [len(number)]), torch.ones(len(rollout)) + (
            0 if carried is None else carried
        )


def make(method, **settings):
    data = OnPolicyDataModule(
        partial(GymnasiumEnv, "Pendulum-v1", episode_length=5),
        {"default_reset": {"rewards": ["reward"]}},
        seed=3,
        **{"evaluate_every": 600, **SIZES, **settings},
    )
    data.trainer = SimpleNamespace(lightning_module=method)
    return data


def stacks(data, count):
    loader = iter(data.train_dataloader())
    return [[batch["number"].tolist() for batch in next(loader).unbind(0)] for _ in range(count)]


def test_every_epoch_goes_through_all_of_a_rollout_in_an_order_of_its_own():
    method = Counting()
    data = make(method)
    assert data.batch_size == 8  # of 24 transitions, in 3 batches
    first, second = stacks(data, 2)
    for stack in (first, second):
        assert [len(batch) for batch in stack] == [8] * 6
        epochs = [list(chain(*stack[:3])), list(chain(*stack[3:]))]
        assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2
        assert epochs[0] != epochs[1]
    assert first != second
    assert stacks(make(Counting()), 2) == [first, second]
    assert method.env_steps == 48
    # Episodes of five steps, of three rows.
    assert method.tallied["episode_length"] == [(15.0, 3), (30.0, 6)]


def test_what_environments_have_to_show_is_tallied_with_every_rollout(monkeypatch):
    monkeypatch.setattr(GymnasiumEnv, "gauges", lambda env: {"level": 0.5})
    method = Counting()
    stacks(make(method), 2)
    assert method.tallied["level"] == [(0.5, 1)] * 2


def test_rollouts_go_on_where_the_one_before_ended():
    method = Counting()
    stacks(make(method), 2)
    first, second = method.rollouts
    assert torch.equal(second["observation"][:, 0], first["next", "observation"][:, -1])
    assert first["next", "done"][:, 4].all()
    assert not torch.equal(first["observation"][:, 5], first["next", "observation"][:, 4])  # a new episode


def test_a_checkpoint_between_rollouts_goes_on_as_if_nothing_was():
    whole = Counting()
    loader = make(whole)
    expected = stacks(loader, 4)
    first = Counting()
    data = make(first)
    assert data.state_dict() == {}
    assert stacks(data, 2) == expected[:2]
    state = data.state_dict()
    second = Counting()
    second.updates = 12
    data = make(second)
    data.load_state_dict(state)
    assert data.state_dict() == state
    assert stacks(data, 2) == expected[2:]
    for found, other in zip(second.rollouts, whole.rollouts[2:]):
        for key in ("observation", "action", ("next", "reward"), ("next", "done")):
            assert torch.equal(found[key], other[key])
    assert data.state_dict()["processes"][0]["carried"].tolist() == [4.0] * 3
    assert second.env_steps == whole.env_steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates_per_step": 5}, "updates_per_step=5 is no multiple of epochs=2."),
        ({"updates_per_step": 10}, "updates_per_step=10: expected batches of one size, found 5 of the 24 transitions"),
        ({"evaluate_every": 10}, "evaluate_every=10 is no multiple of updates_per_step=6."),
    ],
)
def test_sizes_that_do_not_go_together_are_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        make(Counting(), **settings)


def test_a_checkpoint_of_another_rollout_is_refused():
    data = make(Counting())
    stacks(data, 1)
    state = data.state_dict()
    other = make(Counting(), num_envs=6)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^datamodule.num_envs=6: expected 3 as in the checkpoint"):
        stacks(other, 1)
    state["processes"][0]["carried"] = torch.ones(7)
    other = make(Counting())
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^The checkpoint's carried is \[7\], expected \[3\]\.$"):
        stacks(other, 1)


def test_a_method_that_prepares_another_number_of_transitions_is_told():
    method = Counting()
    method.prepare = lambda rollout, carried: (TensorDict({"number": torch.arange(5)}, [5]), None)
    with pytest.raises(ValueError, match=r"^Counting.prepare: expected \[24\] transitions, found \[5\]\.$"):
        stacks(make(method), 1)
