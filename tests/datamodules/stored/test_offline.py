"""What the offline datamodule refuses, each in one sentence, and what it says of the data."""

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
    with pytest.raises(ValueError, match=r"^The data set is of overdrive, expected walker as the environment\.$"):
        module.setup("fit")


def test_a_run_goes_on_with_its_own_data_only():
    first, same, other = datamodule(), datamodule(), datamodule(seed=1)
    for module in (first, same, other):
        module.setup("fit")
    same.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="not the one that the checkpoint's run was trained on"):
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
    with pytest.raises(
        ValueError, match=r"^The data set has observations of size 2, expected 3 as in the environment\.$"
    ):
        module.setup("fit")


def test_without_an_environment_sizes_are_those_of_the_data(capsys):
    module = datamodule(None)
    assert module.spec == {"observation_shape": [2], "action_dim": 2}
    module.setup("fit")
    assert capsys.readouterr().out == ("No environment: scores are of 8 stored transitions, no policy is rolled out.\n")
    (task,) = module.val_dataloader()
    (again,) = module.test_dataloader()
    assert task.transitions.batch_size == (8,)
    assert torch.equal(task.transitions["observation"], again.transitions["observation"])
    assert module.references() == {}
    with pytest.raises(ValueError, match=r"reward=x: expected an experiment with an environment, found one without"):
        module.choose_tasks(reward="x")
