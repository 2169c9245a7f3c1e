from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict.nn import TensorDictModule

from components.control.actors import Actor, ActorPolicy
from components.control.policies import DeterministicPolicy
from components.networks.encoders import FlatObservations
from datamodules.environments.overdrive import OverdriveEnv
from datamodules.environments.zero_value import ZeroValueEnv
from datamodules.online import OnlineDataModule


class Learner:
    """What a datamodule needs of a method: a policy, and somewhere to count."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.updates, self.total_updates, self.env_steps = 0, 40, 0
        self.tallied: dict[tuple[str, ...], list] = {}
        self.weight = torch.zeros(1)

    def policy(self, exploring: bool) -> TensorDictModule:
        assert exploring
        return TensorDictModule(lambda seen: self.weight.expand(len(seen), 2).clone(), ["observation"], ["action"])

    def advance(self, env_steps: int) -> None:
        self.env_steps = env_steps

    def tally(self, names, values, count) -> None:
        self.tallied.setdefault(names, []).append((values.tolist(), count))


def made(tmp_path, **settings) -> tuple[OnlineDataModule, Learner]:
    defaults = {
        "replay_folder": str(tmp_path),
        "num_envs": 2,
        "random_steps": 20,
        "batch_size": 8,
        "updates_per_step": 2,
        "evaluate_every": 10,
        "replay_capacity": 200,
        "checkpoint_every": 10,
    }
    data = OnlineDataModule(partial(OverdriveEnv), {"goals": {"rewards": ["centre"]}}, **{**defaults, **settings})
    learner = Learner()
    data.trainer = SimpleNamespace(lightning_module=learner)
    return data, learner


@pytest.mark.parametrize("ratio", [0.25, 1, 4])
@pytest.mark.parametrize("num_envs", [1, 2, 5])
def test_environment_steps_keep_their_ratio_to_updates(tmp_path, ratio, num_envs):
    data, learner = made(tmp_path, updates_per_env_step=ratio, num_envs=num_envs)
    for number, batch in enumerate(data.train_dataloader()):
        assert batch.shape == (2, 8)
        due = 20 + 2 * number / ratio
        assert due - 1 < learner.env_steps < due + num_envs
    assert number == 4  # up to the evaluation, two updates a step


def test_first_steps_are_random_and_then_the_policy_acts_as_it_is_by_then(tmp_path):
    data, learner = made(tmp_path)
    for number, _ in enumerate(data.train_dataloader()):
        learner.weight = torch.full((1,), 0.1 * (number + 1))  # as an update would
    actions = data.replay._steps.data["action"][: data.replay.written, :, 0]
    assert data.replay.written == 14
    assert (actions[:10].std(0) > 0.3).all()
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None].expand(4, 2)
    torch.testing.assert_close(actions[10:], expected)


def test_episodes_are_counted_when_they_end(tmp_path):
    data, learner = made(tmp_path, random_steps=210)
    data.collect_until(learner, 210)
    counted = learner.tallied["episode_return", "episode_length"]
    assert sum(count for _, count in counted) == 4  # two environments, episodes of 50 steps
    assert sum(values[1] for values, _ in counted) == 200


def test_stored_transitions_are_those_of_the_environment(tmp_path):
    data, learner = made(tmp_path, random_steps=120)
    data.collect_until(learner, 120)
    stored = data.replay._steps.data[:60]
    ended = stored["next", "truncated"][..., 0]
    assert ended.nonzero().tolist() == [[49, 0], [49, 1]]
    follows = ~ended[:-1]
    assert torch.equal(stored["observation"][1:][follows], stored["next", "observation"][:-1][follows])
    # The last state of an episode is not the first of the next.
    assert not torch.equal(stored["observation"][50], stored["next", "observation"][49])


def test_restored_experience_goes_on(tmp_path):
    data, learner = made(tmp_path / "a")
    torch.manual_seed(3)
    for _ in data.train_dataloader():
        pass
    state, chance = data.state_dict(), torch.get_rng_state()

    def rest(data, learner):
        learner.updates = 10
        return [batch.clone() for batch in data.train_dataloader()], learner.tallied

    expected = rest(data, learner)
    again, other = made(tmp_path / "a")
    again.load_state_dict(state)
    torch.manual_seed(99)
    iterator = again.train_dataloader()
    torch.set_rng_state(chance)
    other.updates = 10
    found, _ = rest(again, other)
    assert len(found) == 5
    assert all((a == b).all() for a, b in zip(found, expected[0], strict=True))
    assert iterator is not None


def test_episodes_that_cannot_go_on_end_in_the_experience_too(tmp_path):
    data, _ = made(tmp_path)
    for _ in data.train_dataloader():
        pass
    again, learner = made(tmp_path, n_step=3)
    again.load_state_dict(data.state_dict())
    again._make_env = Forgetful
    again.collect_until(learner, 40)
    steps = data.replay.written
    ended = again.replay._steps.data["next", "truncated"][:, :, 0]
    assert ended[:20].nonzero().tolist() == [[steps - 1, 1]]
    assert again._episode[:, 1].tolist() == [20, 20 - steps]
    drawn = again.replay._draw(1000, torch.Generator().manual_seed(0), 3)
    assert {steps - 3, steps - 2, steps - 1} & set((drawn[drawn % 2 == 1] // 2).tolist()) == {steps - 3}


class Forgetful(OverdriveEnv):
    """Can't bring back the episodes of its second row."""

    def _set_state_tensors(self, state) -> None:
        super()._set_state_tensors(state)
        self.began_anew[1] = True


def test_rewards_of_nothing_are_worth_nothing(tmp_path):
    env = ZeroValueEnv(500, seed=0)
    state = env.reset()
    rewards = []
    for _ in range(40):
        state["action"] = torch.rand(500, 3)
        stepped = env.step(state)
        rewards.append(stepped["next", "reward"])
        state = stepped["next"]
    rewards = torch.stack(rewards)
    assert rewards.mean().abs() < 0.03
    assert rewards.std().item() == pytest.approx(1, rel=0.02)
    assert state["observation"].abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_steps": 1}, "random_steps=1: expected at least n_step x num_envs = 2"),
        ({"evaluate_every": 5}, "evaluate_every=5 is no multiple of updates_per_step=2"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **settings)


class Constant(Actor):
    """Acts as its only weight says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def act(self, observation):
        return self.weight.expand(len(observation), 2).clone()

    explore = act

    def bootstrap(self, observation):
        return self.act(observation), torch.zeros(len(observation))

    def forward(self, observation):
        return DeterministicPolicy(self.act(observation))


@pytest.mark.parametrize("collector", ["async", pytest.param("ray", marks=pytest.mark.slow)])
def test_other_processes_collect_with_the_newest_policy_or_that_of_one_collection_ago(tmp_path, collector):
    if collector == "ray":
        pytest.importorskip("ray")
    data, learner = made(tmp_path, collector=collector, steps_per_collection=2)
    actor = Constant()
    learner.policy = lambda exploring: TensorDictModule(
        ActorPolicy(FlatObservations([2]), actor, "explore"), ["observation"], ["action"]
    )
    try:
        for number, _ in enumerate(data.train_dataloader()):
            with torch.no_grad():
                actor.weight.fill_(0.1 * (number + 1))
        state = data.state_dict()
    finally:
        data.teardown("fit")
    actions = data.replay._steps.data["action"][: data.replay.written, :, 0]
    assert (actions[:10].std(0) > 0.3).all()  # random at first
    acted = actions[10:].mean(1)
    assert ((acted * 10).round() * 0.1 - acted).abs().max() < 1e-6
    # What the learner knew by then, or one collection before; new weights may arrive between two steps of a collection.
    assert (acted.diff() > -1e-6).all()
    assert 0 <= acted[0] <= acted[-1] <= 0.4
    assert acted[-1] >= 0.1
    stored = data.replay._steps.data[: data.replay.written]
    assert not torch.equal(stored["observation"][:, 0], stored["observation"][:, 1])  # episodes of their own
    follows = ~stored["next", "truncated"][:-1, :, 0]
    assert torch.equal(stored["observation"][1:][follows], stored["next", "observation"][:-1][follows])
    assert state["processes"][0]["environment"] is None
    assert state["processes"][0]["written"] == data.replay.written


def test_collecting_process_that_stopped_is_one_sentence(tmp_path):
    data, learner = made(tmp_path)
    data.collect_until(learner, 20)

    def broken():
        raise EOFError
        yield

    data._collected = broken()
    with pytest.raises(ValueError, match="collector=sync: the process that collects has stopped; its own error stands"):
        data.collect_until(learner, 40)


def test_unknown_storage_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="Unknown replay_storage='disk': expected one of memory, memmap"):
        made(tmp_path, replay_storage="disk")


def test_unknown_collector_is_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown collector='slurm': expected one of sync, async, ray"):
        made(tmp_path, collector="slurm")


@pytest.mark.parametrize("keep", [True, False])
def test_replay_files_of_a_finished_run_stay_if_they_are_wanted(tmp_path, keep):
    data, learner = made(tmp_path / "replay", keep_replay=keep)
    data.collect_until(learner, 30)
    data.state_dict()
    assert (tmp_path / "replay").is_dir()
    data.finish()
    assert (tmp_path / "replay").is_dir() == keep
