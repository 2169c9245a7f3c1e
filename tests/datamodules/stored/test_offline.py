"""What the offline datamodule refuses, each in one sentence."""

from functools import partial

import pytest

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.overdrive import OverdriveEnv
from datamodules.stored.offline import OfflineDataModule
from datamodules.stored.overdrive import overdrive_dataset


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


@pytest.mark.parametrize("name", ["batch_size", "updates_per_step", "evaluate_every", "episodes", "inference_samples"])
def test_counts_start_at_one(name):
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
        datamodule(**{name: 0})


def test_evaluations_come_after_whole_steps():
    with pytest.raises(ValueError, match="evaluate_every=5 is no multiple of updates_per_step=2"):
        datamodule(evaluate_every=5)
