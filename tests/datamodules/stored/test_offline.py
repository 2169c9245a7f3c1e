"""What the offline datamodule refuses, each in one sentence, and what it says of the data."""

import re
from functools import partial

import numpy as np
import pytest
import torch

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.overdrive import OverdriveEnv
from datamodules.environments.zero_value import ZeroValueEnv
from datamodules.stored.offline import OfflineDataModule
from datamodules.stored.overdrive import overdrive_dataset
from datamodules.stored.own_files import read_own


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
