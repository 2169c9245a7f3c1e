"""An environment that takes its state back goes on, bit for bit, in the middle of episodes."""

from functools import partial

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.gymnasium import D4RL_BODIES, GymnasiumEnv
from datamodules.environments.overdrive import OverdriveEnv

ENVIRONMENTS = {
    "cheetah": partial(BatchedMujocoEnv, "cheetah", "run", episode_length=12),
    "overdrive": OverdriveEnv,
    **{body: partial(GymnasiumEnv, body, episode_length=30) for body in D4RL_BODIES},
    "pendulum": partial(GymnasiumEnv, "Pendulum-v1", episode_length=30),
    "mountain car": partial(GymnasiumEnv, "MountainCarContinuous-v0", episode_length=30),
}
ROWS, STEPS = 3, 25


def collected(env, steps: int):
    def waves(observation):  # depends on the observation, so that any deviation grows
        return (torch.arange(env.action_spec.shape[-1]) + 3 * observation.sum(-1, keepdim=True)).sin()

    policy = TensorDictModule(waves, ["observation"], ["action"])
    collector = Collector(env, policy, frames_per_batch=ROWS * steps, total_frames=ROWS * steps, track_traj_ids=False)
    return next(iter(collector)).clone()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_restored_environment_goes_on_with_its_episodes(name):
    make = partial(ENVIRONMENTS[name], num_envs=ROWS, seed=1)
    env = make()
    collected(env, STEPS)
    state = {key: value.clone() for key, value in env.get_extra_state().items()}
    env._restored = True  # the collector of the uninterrupted run would not begin with a reset
    whole = collected(env, STEPS)
    assert whole["next", "done"].any()  # episodes end and begin on the way

    restored = make(seed=7)
    restored.reset()
    restored.set_extra_state(state)
    again = collected(restored, STEPS)
    for key in whole.keys(True, True):
        assert torch.equal(again[key], whole[key]), key


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_fits_its_specs_and_a_second_reset_begins_anew(name):
    env = ENVIRONMENTS[name](num_envs=ROWS, seed=1)
    check_env_specs(env)
    env.reset()
    env.set_extra_state(env.get_extra_state())
    before = env.current()["observation"].clone()
    assert torch.equal(env.reset()["observation"], before)
    assert not torch.equal(env.reset()["observation"], before)


def test_state_of_another_number_of_environments_is_refused():
    state = OverdriveEnv(2).get_extra_state()
    with pytest.raises(ValueError, match="for 3 environments of overdrive"):
        OverdriveEnv(3).set_extra_state(state)
