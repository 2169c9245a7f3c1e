"""What the offline datamodule refuses, each in one sentence, and what it says of the data."""

import re
from functools import partial

import numpy as np
import pytest
import torch

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.overdrive import OverdriveEnv
from datamodules.environments.swirl import SwirlEnv
from datamodules.environments.zero_value import ZeroValueEnv
from datamodules.stored.offline import OfflineDataModule
from datamodules.stored.overdrive import overdrive_dataset
from datamodules.stored.own_files import read_own
from datamodules.stored.swirl import swirl_dataset


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
