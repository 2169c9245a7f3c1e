"""What the offline datamodule refuses, each in one sentence, and what it says of the data."""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.overdrive import OverdriveEnv
from datamodules.environments.swirl import SwirlEnv
from datamodules.environments.zero_value import ZeroValueEnv
from datamodules.stored.offline import OfflineDataModule
from datamodules.stored.overdrive import overdrive_dataset
from datamodules.stored.own_files import read_own
from datamodules.stored.swirl import swirl_dataset
from lightning_modules.base import LearningMethod


def datamodule(environment=OverdriveEnv, seed: int = 0, **settings) -> OfflineDataModule:
    sizes = {"batch_size": 8, "updates_per_step": 2, "evaluate_every": 4} | settings
    rewards = {"goals": {"rewards": {"right": "x", "never": "x > 30"}}}
    return OfflineDataModule(partial(overdrive_dataset, "full", 5, seed), environment, rewards, **sizes)


def test_data_of_another_domain_are_refused():
    environment = partial(BatchedMujocoEnv, "walker")
    module = OfflineDataModule(
        partial(overdrive_dataset, "full", 5), environment, {}, batch_size=8, updates_per_step=2, evaluate_every=4
    )
    message = r"^datamodule.dataset: expected data of walker, as datamodule.environment, found those of overdrive\.$"
    with pytest.raises(ValueError, match=message):
        module.setup("fit")


def test_a_run_goes_on_with_its_own_data_only():
    first, same, other = datamodule(), datamodule(), datamodule(seed=1)
    for module in (first, same, other):
        module.setup("fit")
    same.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"datamodule.dataset: expected the data that the checkpoint's run was"):
        other.load_state_dict(first.state_dict())


def test_a_reward_that_says_nothing_is_refused():
    module = datamodule()
    module.setup("fit")
    states, rewards = module.samples(("x", "y"))
    assert rewards.shape == (len(states), 2)
    with pytest.raises(ValueError, match=r"The reward 'x > 30' is 0 in all of 250 sampled states"):
        module.samples(("x", "x > 30"))


def test_evaluations_come_after_whole_steps():
    with pytest.raises(ValueError, match="evaluate_every=5 is no multiple of updates_per_step=2"):
        datamodule(evaluate_every=5)


def test_returns_count_the_last_reward_of_an_episode_too(tmp_path):
    """1,000 rewards of 1 in an episode, the last of which leads nobody knows where, are 1,000."""
    ends = np.arange(2500) % 1000 == 999
    zeros = np.zeros((2500, 3))
    np.savez(
        tmp_path / "a.npz", observations=zeros, actions=zeros, rewards=np.ones(2500), terminals=0 * ends, timeouts=ends
    )
    protocols = {"truth": {"rewards": {"reward": "reward", "double": "2 * reward", "cost": "1 - reward"}}}
    sizes = {"batch_size": 8, "updates_per_step": 2, "evaluate_every": 4}
    module = OfflineDataModule(partial(read_own, tmp_path / "a.npz"), ZeroValueEnv, protocols, **sizes)
    module._reference_env.measure = lambda rows: rows["next", "reward"]  # as environments of stored rewards have it
    module.setup("fit")
    assert len(module.dataset) == 2497
    returns = module._returns(["reward", "2 * reward", "1 - reward"])
    assert returns.tolist() == [[1000, 2000, 0], [1000, 2000, 0], [500, 1000, 0]]


def test_widths_of_the_environment_are_expected(tmp_path):
    zeros = np.zeros((4, 2))
    np.savez(tmp_path / "a.npz", observations=zeros, actions=zeros, rewards=zeros[:, 0], terminals=[0, 1, 0, 1])
    sizes = {"batch_size": 8, "updates_per_step": 2, "evaluate_every": 4}
    module = OfflineDataModule(partial(read_own, tmp_path / "a.npz"), ZeroValueEnv, {}, **sizes)
    message = r"^datamodule.dataset: expected observations of size 3, as in datamodule.environment, found size 2\.$"
    with pytest.raises(ValueError, match=message):
        module.setup("fit")


def test_what_was_read_is_said_and_ends_that_are_not_marked(tmp_path, capsys):
    n = 100
    arrays = {
        "observations": np.arange(n)[:, None] % 10,
        "actions": np.zeros((n, 1)),
        "rewards": np.full(n, -0.5),
        "terminals": np.arange(n) == 69,
        "timeouts": np.isin(np.arange(n), [9, 19, 29, 39, 49, 59, 79, 89]),
    }
    arrived = {"next_observations": arrays["observations"] + 1}
    sizes = {"batch_size": 8, "updates_per_step": 2, "evaluate_every": 4}
    said = []
    for name, changes in (("a", {}), ("b", arrived), ("c", {**arrived, "timeouts": np.zeros(n)})):
        np.savez(tmp_path / f"{name}.npz", **{**arrays, **changes})
        OfflineDataModule(partial(read_own, tmp_path / f"{name}.npz"), None, {}, **sizes).setup("fit")
        said += [line for line in capsys.readouterr().out.splitlines() if "No environment" not in line]
    assert said == [
        "Data: 91 transitions (and 9 last rows of episodes, of which nobody knows where they led) in 10 episodes, 1 "
        "ended by terminals and 9 cut off, returns from -5 to -5.",
        "Data: 100 transitions in 10 episodes, 1 ended by terminals and 9 cut off, returns from -5 to -5.",
        "Data: 100 transitions in 2 episodes, 1 ended by terminals and 1 cut off, returns from -35 to -15.",
        "8 of these transitions led elsewhere than where the next one of their episode begins: a sign of ends that are "
        "not marked in timeouts (or truncations).",
    ]


def test_without_an_environment_sizes_are_those_of_the_data(capsys):
    module = datamodule(None)
    assert module.spec == {"observation_shape": [2], "action_dim": 2}
    module.setup("fit")
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"Data: 250 transitions in 5 episodes, 0 ended by terminals and 5 cut off, returns .*\.", said[0]
    )
    assert said[1:] == ["No environment: scores are of 8 stored transitions, no policy is rolled out."]
    (task,) = module.val_dataloader()
    (again,) = module.test_dataloader()
    assert task.transitions.batch_size == (8,)
    assert torch.equal(task.transitions["observation"], again.transitions["observation"])
    assert module.references() == {}
    with pytest.raises(ValueError, match=r"reward=x: expected an experiment with an environment, found one without"):
        module.choose_tasks(reward="x")


def swirling(**settings) -> OfflineDataModule:
    sizes = {"batch_size": 8, "updates_per_step": 2, "evaluate_every": 4} | settings
    return OfflineDataModule(partial(swirl_dataset, 4), SwirlEnv, {"swirl": {"rewards": {"goal": "goal_2"}}}, **sizes)


def made(**settings) -> OfflineDataModule:
    module = swirling(**settings)
    module.setup("fit")
    return module


def test_episodes_of_some_behaviours_are_kept_whole():
    whole, some = made().dataset, made(sources=["goal_5", 2]).dataset
    assert (some.episodes, len(some)) == (8, 240)
    assert some.data["source"].unique().tolist() == [2, 5]
    assert torch.equal(
        some.data["action"], whole.data["action"][torch.isin(whole.data["source"], torch.tensor([2, 5]))]
    )
    assert some.episode_lengths().tolist() == [30] * 8


def test_so_many_episodes_are_drawn_by_the_seed():
    first, again, other = (made(max_episodes=10, seed=seed).dataset for seed in (0, 0, 1))
    assert (first.episodes, len(first)) == (10, 300)
    assert torch.equal(first.data["action"], again.data["action"])
    assert not torch.equal(first.data["action"], other.data["action"])
    assert not first.loose_ends()
    assert len(first.data["source"].unique()) > 3


def test_a_reward_is_that_of_the_task_at_hand_and_what_agents_learn_from():
    module = made(reward="2 * x", sources=["goal_0"])
    torch.testing.assert_close(
        module.dataset.data["next", "reward"][:, 0], 2 * module.dataset.data["next", "physics"][:, 0].float()
    )
    assert torch.equal(made().dataset.data["next", "reward"], torch.zeros(960, 1))
    assert not made(reward="goal_2").dataset.data["next", "reward"].eq(0).any()


def test_a_run_goes_on_with_the_episodes_and_the_reward_that_it_began_with():
    first = made(reward="goal_2", sources=["goal_2"])
    made(reward="goal_2", sources=["goal_2"]).load_state_dict(first.state_dict())
    for changed in ({"reward": "goal_3"}, {"sources": ["goal_3"]}, {"max_episodes": 2}):
        with pytest.raises(ValueError, match=r"datamodule.dataset: expected the data that the checkpoint's run was"):
            made(**({"reward": "goal_2", "sources": ["goal_2"]} | changed)).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ["goal_9"]}, r"datamodule.sources: expected some of goal_0, goal_1, .*goal_7, found goal_9\."),
        ({"sources": [9]}, r"datamodule.sources: expected some of goal_0, .*, found 9\."),
        ({"max_episodes": 33}, r"datamodule.max_episodes=33: expected at most the 32 there are\."),
        ({"reward": "goal_9"}, r"datamodule.reward=goal_9: Unknown task 'goal_9' of swirl"),
        ({"sources": []}, r"datamodule.sources=\[\]: expected at least one"),
    ],
)
def test_data_that_are_not_there(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_a_reward_needs_an_environment():
    with pytest.raises(
        ValueError, match=r"datamodule.reward=x: expected an environment that measures it, found none\."
    ):
        OfflineDataModule(
            partial(swirl_dataset, 4), None, {}, reward="x", batch_size=8, updates_per_step=2, evaluate_every=4
        )


# -- priorities ---------------------------------------------------------------------------------------------------


class Replay(LearningMethod):
    """Prioritised replay (arXiv 1511.05952): errors to a power, importance weights, and nothing that is learned."""

    def __init__(self, prioritised: str, exponent: float = 0.6) -> None:
        super().__init__(updates=40, updates_per_step=2)
        self.prioritised, self.exponent = prioritised, exponent
        self.drawn: list[TensorDict] = []
        self.register_buffer("errors", torch.linspace(0.1, 5.0, 960, dtype=torch.float64))

    def update(self, batch: TensorDict) -> TensorDict:
        self.drawn.append(batch)
        rows = batch if self.prioritised == "batch" else batch["prioritised"]
        weight = 1 / (960 * rows["log_probability"].exp())
        logit = self.exponent * self.errors[rows["index"]].log()
        priorities = TensorDict({"index": rows["index"], "logit": logit}, batch_size=len(logit))
        return TensorDict({"weight": weight.mean(), "priorities": priorities})

    def evaluate(self, task):
        raise NotImplementedError


class Fit:
    """What a trainer does with a method and a datamodule, as far as priorities go."""

    def __init__(self, prioritised: str) -> None:
        self.data, self.lightning_module, self.should_stop = made(batch_size=64), Replay(prioritised), False
        self.data.trainer = self.lightning_module.trainer = self

    def to(self, updates: int) -> "Fit":
        while self.lightning_module.updates < updates:
            for stack in self.data.train_dataloader():
                self.lightning_module.training_step(stack, 0)
        return self


def test_rows_are_drawn_by_the_priorities_that_a_method_gave_the_update_before():
    fit = Fit("batch").to(40)
    method, expected = fit.lightning_module, torch.zeros(960, dtype=torch.float64)
    for batch in method.drawn:
        probabilities = expected.softmax(0)
        torch.testing.assert_close(batch["log_probability"][:, 0], probabilities.log()[batch["index"]].float())
        ends = probabilities.cumsum(0)[batch["index"]]
        parts = torch.arange(64) / 64
        assert (ends > parts - 1e-9).all()
        assert (ends - probabilities[batch["index"]] < parts + 1 / 64 + 1e-9).all()
        assert torch.equal(batch["observation"], fit.data.dataset.data["observation"][batch["index"]])
        expected[batch["index"]] = 0.6 * method.errors[batch["index"]].log()
    assert (expected != 0).float().mean() > 0.7
    drawn = torch.cat([batch["index"] for batch in method.drawn[-10:]])
    assert method.errors[drawn].mean() > 1.1 * method.errors.mean()


def test_rows_beside_a_batch_are_drawn_by_priorities_and_the_batch_is_not():
    method = Fit("beside").to(40).lightning_module
    for batch in method.drawn:
        assert batch.batch_size == batch["prioritised"].batch_size == (64,)
        assert "log_probability" not in batch
    uniform = torch.cat([batch["index"] for batch in method.drawn])
    assert abs(method.errors[uniform].mean() / method.errors.mean() - 1) < 0.03
    assert not torch.equal(method.drawn[0]["index"], method.drawn[1]["index"])


def test_priorities_go_on_from_a_checkpoint_with_those_that_were_not_taken_yet():
    whole = Fit("batch").to(8)
    state = {
        name: value if name == "data" else {key: each.clone() for key, each in value.items()}
        for name, value in whole.data.state_dict().items()
    }
    resumed = Fit("batch")
    resumed.lightning_module.updates = 8
    resumed.data.load_state_dict(state)
    for fit in (whole, resumed):
        fit.to(16)
    for one, other in zip(whole.lightning_module.drawn[8:], resumed.lightning_module.drawn, strict=True):
        assert torch.equal(one["index"], other["index"])
    for damaged, message in (
        ({"level_0": torch.zeros(3)}, r"priorities.level_0: expected numbers \[8, 128\], found others"),
        ([1], r"priorities: expected those of 960 rows, found list"),
    ):
        wrong = Fit("batch")
        wrong.data.load_state_dict({**state, "priorities": damaged})
        with pytest.raises(ValueError, match=message):
            wrong.data.train_dataloader()


def test_statistics_and_next_actions_are_those_of_what_is_learned_from():
    module = made(max_episodes=3)
    data = module.dataset.data
    mean, std = module.observation_statistics()
    torch.testing.assert_close(mean, data["observation"].double().mean(0))
    torch.testing.assert_close(std, data["observation"].double().std(0, correction=0))
    following = module.dataset.next_actions()
    for row in range(len(data)):
        if row + 1 < len(data) and data["episode"][row] == data["episode"][row + 1]:
            assert torch.equal(following[row], data["action"][row + 1])
        else:
            assert following[row].isnan().all()
    assert following.isnan().all(-1).sum() == 3


def test_a_method_that_forgets_its_priorities_is_named(monkeypatch):
    fit = Fit("batch")
    monkeypatch.setattr(Replay, "update", lambda self, batch: TensorDict({"weight": torch.ones(())}))
    with pytest.raises(ValueError, match=r"Replay.update: expected priorities, an index and a logit for each row"):
        fit.to(2)


def test_evaluations_without_an_environment_have_the_next_actions_that_are_asked_for():
    module = datamodule(None)
    module.setup("fit")
    (task,) = module.val_dataloader()
    assert ("next", "data_action") not in task.transitions.keys(True)
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(next_data_actions=True, futures=None))
    (task,) = module.val_dataloader()
    assert task.transitions["next", "data_action"].shape == (8, 2)


def test_evaluations_and_batches_have_the_futures_that_are_asked_for():
    module = datamodule(None)
    module.setup("fit")
    method = SimpleNamespace(
        next_data_actions=False, futures=(3, 0.9, 5), prioritised=None, device="cpu", updates=0, total_updates=4
    )
    module.trainer = SimpleNamespace(lightning_module=method)
    (task,) = module.val_dataloader()
    assert task.transitions["next", "future"].shape == (8, 3, 2)
    stacks = list(module.train_dataloader())
    assert [stack["next", "future"].shape for stack in stacks] == [(2, 8, 3, 2)] * 2
