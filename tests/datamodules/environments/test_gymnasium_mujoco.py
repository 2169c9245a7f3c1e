import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs, step_mdp

from datamodules.environments.gymnasium_mujoco import GYMNASIUM, GymnasiumMujocoEnv


def random_actions(env: GymnasiumMujocoEnv, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return 2 * torch.rand(steps, *env.action_spec.shape, generator=generator) - 1


def play(env: GymnasiumMujocoEnv, state: TensorDict, actions: torch.Tensor) -> TensorDict:
    """The steps [n, steps] that the actions make, without resets."""
    steps = []
    for action in actions:
        state["action"] = action
        steps.append(env.step(state)["next"].clone())
        state = step_mdp(state)
    return torch.stack(steps, 1)


@pytest.mark.parametrize("body", GYMNASIUM)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_gymnasium(body):
    env = GymnasiumMujocoEnv(body, num_envs=2, seed=3)
    start = env.reset()
    actions = random_actions(env, 30)
    steps = play(env, start.clone(), actions)
    own = gymnasium.make(GYMNASIUM[body]).unwrapped
    for row in range(2):
        own.reset(seed=0)
        physics = start["physics"][row].numpy()
        own.set_state(physics[: own.model.nq], physics[own.model.nq :])
        for t in range(len(actions)):
            observation, reward, terminated, _, _ = own.step(own.action_space.high * actions[t, row].numpy())
            found = steps[row, t]
            np.testing.assert_allclose(found["observation"], observation, rtol=1e-4, atol=1e-5)
            assert float(found["reward"]) == pytest.approx(reward, rel=1e-4, abs=1e-5)
            assert bool(found["terminated"]) == terminated
            if terminated:
                break


def test_specs():
    check_env_specs(GymnasiumMujocoEnv("walker2d-medium-expert-v2", num_envs=2))


def test_a_fallen_row_waits_without_reward():
    env = GymnasiumMujocoEnv("hopper", num_envs=4, seed=0)
    steps = play(env, env.reset(), random_actions(env, 200))
    terminated = steps["terminated"].squeeze(-1)
    assert terminated.any(1).all()  # random hoppers fall within seconds
    for row in range(4):
        fall = int(terminated[row].nonzero()[0, 0])
        assert terminated[row, fall:].all()
        assert steps["reward"][row, fall] != 0
        assert not steps["reward"][row, fall + 1 :].any()
        assert (steps["physics"][row, fall:] == steps["physics"][row, fall]).all()
        assert not steps["truncated"][row].any()
    assert torch.equal(steps["measurements"], steps["reward"])
    fresh = env.reset()
    assert not fresh["done"].any()


def test_time_is_up_without_termination():
    env = GymnasiumMujocoEnv("halfcheetah", num_envs=2, episode_length=5)
    steps = play(env, env.reset(), random_actions(env, 7))
    assert steps["truncated"].squeeze(-1).long().tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 2
    assert not steps["terminated"].any()
    assert torch.equal(steps["done"], steps["truncated"])


def test_starts_follow_the_seed():
    starts = [GymnasiumMujocoEnv("hopper", num_envs=2, seed=seed).reset()["physics"] for seed in (1, 1, 2)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0][0], starts[0][1])


def test_stored_states_can_be_entered_again():
    env = GymnasiumMujocoEnv("walker2d", num_envs=2, seed=0)
    steps = play(env, env.reset(), random_actions(env, 5))
    env.set_physics(steps["physics"][:, 2])
    state = env.current()
    assert torch.equal(state["physics"], steps["physics"][:, 2])
    torch.testing.assert_close(state["observation"], steps["observation"][:, 2])
    assert not state["done"].any()


def test_rewards_are_the_stored_ones():
    env = GymnasiumMujocoEnv("hopper")
    reward = torch.tensor([[1.5], [-2.0]])
    stored = TensorDict({"next": {"reward": reward}}, batch_size=[2])
    assert torch.equal(env.rewards(env.measure(stored), ["reward", "2 * reward"]), torch.cat([reward, 2 * reward], 1))
    with pytest.raises(ValueError, match="can't be recomputed"):
        env.relabel(torch.zeros(1, 12), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="Unknown body 'swimmer-v2'"):
        GymnasiumMujocoEnv("swimmer-v2")
