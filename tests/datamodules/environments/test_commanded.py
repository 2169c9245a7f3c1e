"""Bodies that are told where to go, and what left and right are to them."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.commanded import CommandedEnv
from datamodules.environments.domains import DOMAINS
from datamodules.environments.reflections import reflected_actions, reflected_observations

WALKER = ("torso_height", "torso_upright", "com_velocity_x")
HUMANOID = (
    "joint_angles",
    "head_height",
    "left_foot_height",
    "right_foot_height",
    "left_hand_leftward",
    "right_hand_leftward",
    "torso_upright",
    "forward_lean",
    "leftward_lean",
    "forward_velocity",
    "leftward_velocity",
    "turn_rate",
    "angular_velocity",
    "joint_velocities",
)
COMMANDS = {"forward": [0.5, 2.0], "turn": [-1.0, 1.0]}
walker = partial(CommandedEnv, "walker", task="torso_height", observes=WALKER, num_threads=1)


def step(env, action):
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def test_observed_are_measurements_by_name_the_command_and_the_clock():
    env = walker(num_envs=3, commands=COMMANDS, seed=1)
    state = env.reset()
    assert state["observation"].shape == (3, 3 + 3 + 2)
    named = env.named(state["measurements"])
    told = [f"command_{name}" for name in ("forward", "leftward", "turn")]
    expected = torch.stack([named[name] for name in (*WALKER, *told, "clock_sin", "clock_cos")], 1)
    assert torch.equal(state["observation"], expected)
    assert ((named["command_forward"] >= 0.5) & (named["command_forward"] <= 2)).all()
    assert (named["command_leftward"] == 0).all()
    assert named["command_turn"].abs().max() <= 1
    assert len(set(named["command_forward"].tolist())) == 3
    plain = BatchedMujocoEnv("walker", num_envs=3, num_threads=1)
    plain.set_physics(state["physics"])
    for name, value in plain.named(plain.current()["measurements"]).items():
        assert torch.equal(named[name], value), name


def test_the_clock_goes_with_the_speed_that_is_commanded():
    env = walker(num_envs=2, commands={"forward": [2.0, 2.0]}, cadence=(0.5, 0.4, 0.9, 1.2))
    before = env.named(env.reset()["measurements"])
    after = env.named(step(env, torch.zeros(2, 6))["measurements"])
    angle = [torch.atan2(named["clock_sin"], named["clock_cos"]) for named in (before, after)]
    turned = torch.remainder(angle[1] - angle[0], 2 * torch.pi)
    assert torch.allclose(turned, torch.full((2,), 2 * torch.pi * 1.2 * env.step_seconds), atol=1e-5)


def test_without_a_cadence_there_is_no_clock():
    env = walker(num_envs=2, cadence=None)
    before = env.reset()
    after = step(env, torch.zeros(2, 6))
    assert not before["observation"][:, -2:].any()
    assert not after["observation"][:, -2:].any()
    assert env.named(after["measurements"])["clock_cos"].tolist() == [0.0, 0.0]


def test_rewards_know_commands_and_how_much_the_action_changed():
    env = walker(task="com_velocity_x - command_forward - 3 * action_change", num_envs=2, commands=COMMANDS)
    env.reset()
    first, second = torch.rand(2, 2, 6)
    step(env, first)
    after = step(env, second)
    named = env.named(after["measurements"])
    change = (second - first).square().mean(1)
    assert torch.allclose(named["action_change"], change)
    expected = named["com_velocity_x"] - named["command_forward"] - 3 * change
    assert torch.allclose(after["reward"][:, 0], expected, atol=1e-5)


def test_an_episode_ends_with_a_fall_or_with_its_time():
    env = walker(num_envs=8, ends="torso_height < 1.0", episode_length=40, seed=2)
    env.reset()
    for number in range(1, 41):
        after = step(env, torch.zeros(8, 6))
        fallen = env.named(after["measurements"])["torso_height"] < 1
        assert torch.equal(after["terminated"][:, 0], fallen & (number < 40))
        assert torch.equal(after["truncated"][:, 0], torch.full((8,), number == 40))
    assert fallen.any()


def test_commands_change_in_the_middle_of_an_episode():
    env = walker(num_envs=2, commands=COMMANDS, command_steps=3)
    env.reset()
    told = [env.named(step(env, torch.zeros(2, 6))["measurements"])["command_forward"] for _ in range(7)]
    assert [not torch.equal(a, b) for a, b in pairwise(told)] == [False, False, True, False, False, True]


def test_episodes_may_begin_with_a_part_of_what_is_commanded():
    start = lambda simulator, rows, generator: np.tile(  # noqa: E731
        np.concatenate([simulator.model.qpos0, np.zeros(simulator.model.nv)]), (rows, 1)
    )
    env = CommandedEnv(
        "humanoid", "head_height", 64, observes=HUMANOID, commands={"forward": [1.0, 1.0]}, moving=0.5, start=start
    )
    speed = env.reset()["physics"][:, 28]
    assert 15 < (speed > 0).sum() < 50
    assert speed.max() <= 1
    assert speed[speed > 0].std() > 0.1


def test_a_controller_turns_actions_into_controls():
    seen = []

    def controller():
        def control(physics, action):
            seen.append((physics.clone(), action.clone()))
            return -action

        return control

    env, plain = walker(num_envs=2, controller=controller), walker(num_envs=2)
    start, action = env.reset()["physics"], torch.rand(2, 6)
    plain.reset()
    plain.set_physics(start)
    assert torch.equal(step(env, action)["physics"], step(plain, -action)["physics"])
    assert torch.equal(seen[0][0], start)


def test_a_state_in_the_middle_of_an_episode_goes_on_to_the_bit():
    make = partial(walker, num_envs=3, commands=COMMANDS, command_steps=4, ends="torso_height < 0.5")
    env, other = make(seed=1), make(seed=2)
    env.reset()
    actions = torch.rand(20, 3, 6)
    for action in actions[:6]:
        step(env, action)
    other.set_extra_state(env.get_extra_state())
    assert torch.equal(other.reset()["observation"], env.current()["observation"])
    for action in actions[6:]:
        one, two = step(env, action), step(other, action)
        assert all(torch.equal(one[name], two[name]) for name in ("observation", "measurements", "reward", "done"))
    assert torch.equal(env.reset()["observation"], other.reset()["observation"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"observes": ["speed"]}, "observes=speed: expected a measurement of walker, one of torso_height"),
        ({"commands": {"up": [0, 1]}}, r"commands.up=\[0, 1\]: expected one of forward, leftward, turn"),
        ({"commands": {"turn": [1, 0]}}, r"commands.turn=\[1, 0\]: expected one of"),
        ({"ends": "torso_hight < 1"}, "torso_hight"),
        ({"action_repeat": 2}, "action_repeat=2: expected 1"),
        ({"moving": 0.5}, r"moving=0\.5: expected 0, for the root of walker is not free"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        walker(num_envs=1, **settings)
    assert "\n" not in str(error.value)


def test_rewards_of_stored_states_are_not_made_up():
    with pytest.raises(ValueError, match="Commands of walker are not in its physics"):
        walker(num_envs=1).relabel(torch.zeros(1, 18), torch.zeros(1, 6))


# -- left and right ----------------------------------------------------------------------------------------------------


def reflected_physics(physics: torch.Tensor) -> torch.Tensor:
    """The humanoid in a mirror, from its joints as observed: root, then hinges."""
    joints = reflected_observations("humanoid", ["joint_angles"])
    source, sign = torch.tensor(joints.source[:21]), torch.tensor(joints.sign[:21]).double()
    root, angles, velocity, rates = physics.split([7, 21, 6, 21], 1)
    root = root * torch.tensor([1, -1, 1, 1, -1, 1, -1]).double()  # position, and a quaternion with its real part first
    velocity = velocity * torch.tensor([1, -1, 1, -1, 1, -1]).double()
    return torch.cat([root, angles[:, source] * sign, velocity, rates[:, source] * sign], 1)


def test_the_humanoids_dynamics_and_observations_commute_with_the_mirror():
    env = CommandedEnv("humanoid", "head_height", 4, observes=HUMANOID, commands=COMMANDS, seed=3, num_threads=1)
    other = CommandedEnv("humanoid", "head_height", 4, observes=HUMANOID, num_threads=1)
    start = env.reset()
    other.reset()
    state = other.get_extra_state()
    state["command"] = env._command * torch.tensor([1.0, -1.0, -1.0])
    state["phase"] = torch.remainder(env._phase + torch.pi, 2 * torch.pi)
    other.set_extra_state(state)
    other.set_physics(reflected_physics(start["physics"]))
    acted = reflected_actions("humanoid")
    seen = reflected_observations("humanoid", HUMANOID)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        action = 2 * torch.rand(4, 21, generator=generator) - 1
        mirrored = action[:, list(acted.source)] * torch.tensor(acted.sign)
        one, two = step(env, action), step(other, mirrored)
        torch.testing.assert_close(two["physics"], reflected_physics(one["physics"]), rtol=1e-9, atol=1e-9)
        expected = one["observation"][:, list(seen.source)] * torch.tensor(seen.sign)
        torch.testing.assert_close(two["observation"], expected, rtol=1e-4, atol=1e-5)


def test_both_ankles_turn_about_one_axis():
    acted = reflected_actions("humanoid")
    model = DOMAINS["humanoid"].build(sensors={})
    names = [model.actuator(number).name for number in range(model.nu)]
    signs = {name: acted.sign[number] for number, name in enumerate(names)}
    assert signs["right_ankle_x"] == signs["left_ankle_x"] == -1
    assert signs["right_hip_x"] == signs["right_knee"] == signs["abdomen_y"] == 1
    assert signs["abdomen_z"] == signs["abdomen_x"] == -1
    assert names[acted.source[names.index("left_elbow")]] == "right_elbow"


def test_staggered_episodes_end_at_different_times_and_are_whole_from_then_on():
    env = walker(num_envs=8, episode_length=10, staggered=True, seed=0)
    env.reset()
    ends, length = [[] for _ in range(8)], 40
    for number in range(length):
        state = step(env, torch.zeros(8, 6))
        for row in state["done"][:, 0].nonzero()[:, 0].tolist():
            ends[row].append(number)
        if state["done"].any():
            env.reset(TensorDict({"_reset": state["done"]}, [8]))
    assert len({own[0] for own in ends}) > 3
    assert all(second - first == 10 for own in ends for first, second in pairwise(own))
