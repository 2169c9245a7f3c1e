"""How the humanoid's policies of locomotion act, begin, and drive the rows of a data set."""

from functools import partial

import numpy as np
import pytest
import torch

from components.control.actors import ActorPolicy, NormalActor
from components.control.normalisation import ObservationNormaliser
from components.networks.encoders import FlatObservations
from components.networks.ensemble import EnsembleMLP
from datamodules.behaviours.balance import NQ, BalanceController, Body
from datamodules.behaviours.locomotion import (
    HumanoidTargets,
    Itinerary,
    LocomotionBehaviours,
    LocomotionController,
    StandingController,
    stance,
    start_anywhere,
    start_standing,
)
from datamodules.behaviours.trained import BEHAVIOURS, load_policy, save_policy
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.commanded import CommandedEnv
from datamodules.environments.domains import HUMANOID
from datamodules.environments.simulation import BatchSimulation


def test_no_displacement_at_rest_asks_for_what_holds_the_stance():
    controller, pose = HumanoidTargets(), stance()
    physics = torch.from_numpy(np.concatenate([pose.qpos, np.zeros(27)])[None])
    assert torch.allclose(controller(physics, torch.zeros(1, 21)), torch.from_numpy(pose.control).float()[None])


def test_controls_are_those_of_springs_and_dampers_by_joint():
    controller, pose, body = HumanoidTargets(), stance(), Body()
    rng = np.random.default_rng(0)
    physics = np.concatenate([pose.qpos + 0.05 * rng.normal(size=28), 0.5 * rng.normal(size=27)])
    action = 0.3 * rng.normal(size=21).astype(np.float32)
    found = controller(torch.from_numpy(physics[None]), torch.from_numpy(action[None]))[0]
    gains = {"right_knee": (1, 0.05), "left_hip_y": (1, 0.06), "left_ankle_x": (1, 0.015), "right_elbow": (0.25, 0.01)}
    gains |= {"left_shoulder1": (0.5, 0.02), "abdomen_z": (1, 0.05), "right_hip_z": (1, 0.05)}
    for name, (stiffness, damping) in gains.items():
        number = next(i for i in range(21) if body.model.actuator(i).name == name)
        joint = body.model.joint(name)
        angle, rest = physics[joint.qposadr[0]], pose.qpos[joint.qposadr[0]]
        control = pose.control[number] + stiffness * (action[number] - (angle - rest))
        control -= damping * physics[28 + joint.dofadr[0]]
        assert np.isclose(found[number], np.clip(control, -1, 1), atol=1e-6), name


def test_episodes_begin_near_the_stance():
    simulation = BatchSimulation(HUMANOID, num_threads=1)
    states = start_standing(simulation, 500, torch.Generator().manual_seed(0), noise=0.05)
    assert states.shape == (500, 55)
    assert np.allclose(states[:, :7], stance().qpos[:7])
    assert np.isclose((states[:, 7:28] - stance().qpos[7:]).std(), 0.05, rtol=0.05)
    assert np.isclose(states[:, 28:].std(), 0.05, rtol=0.05)


def test_getting_up_begins_anywhere():
    simulation = BatchSimulation(HUMANOID, num_threads=1)

    def heads(shares):
        generator = torch.Generator().manual_seed(0)
        states = start_anywhere(simulation, 40, generator, shares)
        sensors = simulation.snapshot(states, np.zeros((40, 21))).sensors
        return sensors["head"][:, 2]

    assert (heads({"standing": 1.0}) > 1.3).all()
    crouching = heads({"crouching": 1.0})
    assert ((crouching > 0.8) & (crouching < 1.4)).all()
    falling = heads({"falling": 1.0})
    assert falling.max() - falling.min() > 0.4
    assert falling[::4].mean() > falling[3::4].mean() + 0.2  # the longer, the lower
    assert (heads({"lying": 1.0}) < 0.7).float().mean() > 0.9
    assert (heads({"reset": 1.0}) > 1.2).all()  # in the air
    mixed = heads(None)
    assert mixed.min() < 0.3 < 1.3 < mixed.max()
    assert torch.equal(mixed, heads(None))
    with pytest.raises(ValueError, match=r"shares=.*: expected some of reset, lying, falling, crouching, standing"):
        start_anywhere(simulation, 2, torch.Generator(), {"flying": 1.0})


OBSERVES = ["joint_angles", "head_height", "torso_upright", "forward_velocity", "angular_velocity", "joint_velocities"]
CADENCES = [[0.8, 0.35, 0.9, 1.9], None]


@pytest.fixture
def skills(tmp_path):
    """Two policies of random weights, as files; the second has no clock."""
    torch.manual_seed(0)
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, cadence in zip(paths, CADENCES):
        size = 21 + 3 + 3 + 21 + 5
        network = partial(EnsembleMLP, hidden_dim=8, activation="silu", last_gain=1.0)
        actor = NormalActor(size, 21, network, std=0.3)
        encoder = torch.nn.Sequential(ObservationNormaliser([size]), FlatObservations([size]))
        encoder[0].merge(torch.randn(50, size))
        save_policy(ActorPolicy(encoder, actor, "explore"), path, {"observes": OBSERVES, "cadence": cadence})
    return paths


def controller(paths, env, skills, times, commands=None, noise=0.0, rises=False, **settings):
    rows = len(skills)
    commands = torch.zeros(rows, len(skills[0]), 3) if commands is None else torch.tensor(commands)
    itinerary = Itinerary(
        torch.tensor(skills), commands, torch.tensor(times), torch.full((rows,), noise), torch.full((rows,), rises)
    )
    return LocomotionController(paths, env.columns, itinerary, riser=1, seed=0, **settings)


@pytest.mark.parametrize("skill", [0, 1])
def test_a_policy_does_in_data_what_it_did_where_it_learned(skills, skill):
    learned = CommandedEnv(
        "humanoid",
        "head_height",
        3,
        observes=OBSERVES,
        commands={"forward": [1.0, 2.0]},
        cadence=CADENCES[skill],
        controller=HumanoidTargets,
        start=start_standing,
        num_threads=1,
    )
    plain = BatchedMujocoEnv("humanoid", num_envs=3, num_threads=1)
    there = learned.reset()
    plain.set_physics(there["physics"])
    commands = learned._command.unsqueeze(1).tolist()
    drives = controller(skills, plain, [[skill]] * 3, [[0]] * 3, commands)
    drives.phase.copy_(learned._phase)
    policy, here = load_policy(skills[skill], "act"), plain.current()
    for _ in range(8):
        there = learned.step(there.set("action", policy(there["observation"])))["next"]
        here = plain.step(here.set("action", drives(here["physics"], here["measurements"])))["next"]
        assert torch.allclose(there["physics"], here["physics"], atol=1e-6)


def test_rows_follow_their_itineraries_and_get_up_when_they_lie(skills):
    env = BatchedMujocoEnv("humanoid", num_envs=2, num_threads=1)
    state = env.reset()
    head = env.columns["head_height"].start
    drives = controller(skills, env, [[0, 1], [0, 0]], [[0, 2], [0, 5]], [[[1.0, 0, 0]] * 2] * 2, rises=True)

    def now(*heights):
        measured = state["measurements"].clone()
        measured[:, head], measured[:, env.columns["torso_upright"].start] = torch.tensor(heights), 1.0
        drives(state["physics"], measured)
        return drives.rising.tolist()

    place = [drives._now(torch.full((2,), 1.4), torch.ones(2))[0].tolist() for drives.clock in torch.arange(4)]
    assert place == [[0, 0], [0, 0], [1, 0], [1, 0]]
    drives.steady.zero_()
    assert now(1.4, 0.8) == [False, True]
    assert now(1.4, 1.2) == [False, True]
    skill, command = drives._now(torch.tensor([1.4, 1.2]), torch.ones(2))
    assert skill.tolist()[1] == 1
    assert command[:, 0].tolist() == [1.0, 0.0]
    for _ in range(drives.STEADY - 1):
        assert now(1.4, 1.4) == [False, True]
    assert now(1.4, 1.4) == [False, False]
    stays = controller(skills, env, [[0]], [[0]])
    assert stays._now(torch.tensor([0.1]), torch.zeros(1))[0].tolist() == [0]
    dropped = controller(skills, env, [[0]], [[0]], rises=True)
    assert dropped._now(torch.tensor([1.5]), torch.tensor([0.2]))[0].tolist() == [1]


def standing(rows, joints=0.0):
    generator = torch.Generator().manual_seed(0)
    physics = torch.from_numpy(np.tile(np.concatenate([stance().qpos, np.zeros(27)]), (rows, 1)))
    physics[:, 7:NQ] += joints * torch.randn(rows, NQ - 7, generator=generator, dtype=torch.float64)
    physics[:, NQ:] = 0.1 * torch.randn(rows, 27, generator=generator, dtype=torch.float64)
    return physics


def test_to_stand_in_balance_is_what_the_stance_does_and_comes_back_to_where_it_began():
    still = torch.zeros(3)
    plain = BalanceController([stance()], torch.zeros(3, 2), torch.tensor([[0.0, 1.0]] * 3), still, still, 0)
    controller, everyone = StandingController(3), torch.ones(3, dtype=torch.bool)
    physics = standing(3)
    torch.testing.assert_close(controller(physics, everyone).float(), plain(physics))
    physics[:, :2] += torch.tensor([[0.01, 0.0], [0.0, 0.02], [-0.01, 0.01]])
    torch.testing.assert_close(controller(physics, everyone).float(), plain(physics))
    resumed = StandingController(3)
    resumed.load_state_dict(controller.state_dict())
    assert torch.equal(resumed(physics, everyone), controller(physics, everyone))
    began_here = StandingController(3)(physics, everyone)
    assert not torch.allclose(began_here, controller(physics, everyone))
    controller(physics, ~everyone)  # whoever stopped begins anew
    torch.testing.assert_close(controller(physics, everyone), began_here)


def test_to_stand_in_balance_does_not_depend_on_place_and_heading():
    physics = standing(3, joints=0.05)
    elsewhere, angle = physics.clone(), torch.tensor([0.5, 3.0, -2.0], dtype=torch.float64)
    cos, sin, half = angle.cos(), angle.sin(), angle / 2
    for x in (0, NQ):  # place and velocity
        elsewhere[:, x] = cos * physics[:, x] - sin * physics[:, x + 1]
        elsewhere[:, x + 1] = sin * physics[:, x] + cos * physics[:, x + 1]
    elsewhere[:, :2] += torch.tensor([3.0, -1.0])
    w, x, y, z = physics[:, 3:7].unbind(1)
    c, s = half.cos(), half.sin()
    elsewhere[:, 3:7] = torch.stack([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w], 1)
    everyone = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(StandingController(3)(elsewhere, everyone), StandingController(3)(physics, everyone))


def test_who_has_got_up_stands_in_balance():
    """Of rows that rise and then stay, nearly all stand in the end, driven by the stance's controller."""
    episodes = LocomotionBehaviours({"rise": 1.0}, 0.3).episodes(24, 0, 400)
    starts = episodes.physics.numpy()
    env = BatchedMujocoEnv("humanoid", num_envs=24, start=lambda *_: starts)
    state = env.reset()
    for _ in range(400):
        state = env.step(episodes.policy(state))["next"]
    stands = episodes.policy.module.stander.standing
    assert 6 <= stands.sum() <= 18
    measured = env.named(state["measurements"])
    tall = (measured["head_height"] > 1.3) & (measured["torso_upright"] > 0.9)
    assert tall[stands].float().mean() > 0.8


def test_noise_comes_in_bursts_and_goes_on_where_it_was(skills):
    env = BatchedMujocoEnv("humanoid", num_envs=4, num_threads=1)
    state = env.reset()
    settings = {"skills": [[0]] * 4, "times": [[0]] * 4, "bursts": (1, 5)}
    quiet, noisy, other = (controller(skills, env, noise=noise, **settings) for noise in (0.0, 0.2, 0.2))
    pushed = []
    for step in range(20):
        if step == 7:
            other.load_state_dict(noisy.state_dict())
        expected = quiet(state["physics"], state["measurements"])
        found = noisy(state["physics"], state["measurements"])
        pushed.append((found != expected).any(1))
        if step >= 7:
            assert torch.equal(other(state["physics"], state["measurements"]), found)
    assert torch.stack(pushed).sum(0).tolist() == [4] * 4


def test_episodes_of_locomotion_are_those_of_their_seed():
    behaviours = LocomotionBehaviours()
    first, again, other = (behaviours.episodes(10, seed, 40) for seed in (3, 3, 4))
    assert torch.equal(first.physics, again.physics)
    assert not torch.equal(first.physics, other.physics)
    assert first.source.tolist() == [4] * 10
    assert not first.rises.any()
    env = BatchedMujocoEnv("humanoid", num_envs=10, num_threads=1, start=lambda *_: first.physics.numpy())
    state = env.reset()
    actions = [each.policy(state.clone())["action"] for each in (first, again)]
    assert torch.equal(*actions)
    assert actions[0].abs().max() <= 1
    with pytest.raises(ValueError, match=r"shares=\{'fly': 1.0\}: expected some of walk, rise"):
        LocomotionBehaviours({"fly": 1.0})


def test_rows_that_rise_begin_lying_or_in_the_air():
    episodes = LocomotionBehaviours({"walk": 0.6, "rise": 0.4}).episodes(10, 0, 40)
    assert episodes.source.tolist() == [4] * 6 + [5] * 4
    assert episodes.rises[6:].all()
    heads = (
        BatchSimulation(HUMANOID, num_threads=1).snapshot(episodes.physics.numpy(), np.zeros((10, 21))).sensors["head"]
    )
    assert (heads[:6, 2] > 1.3).all()
    assert heads[6:, 2].min() < 0.5
    alone = LocomotionBehaviours({"rise": 1.0}).episodes(3, 0, 40)
    assert alone.rises.all()


def test_shipped_skills_go_where_they_are_told():
    """Each for four seconds from standing, in the plain environment; one of ten falls at the start."""
    told = {
        "walk_late": ([1.0, 0, 0], "forward_velocity", 0.8),
        "run_late": ([3.5, 0, 0], "forward_velocity", 2.0),
        "backward_late": ([-0.5, 0, 0], "forward_velocity", -0.35),
        "sideways_late": ([0, 0.4, 0], "leftward_velocity", 0.3),
    }
    paths = [BEHAVIOURS / "humanoid" / f"{name}.safetensors" for name in told]
    rows = 8 * len(told)
    env = BatchedMujocoEnv("humanoid", num_envs=rows, start=start_standing, seed=0)
    state = env.reset()
    commands = [[command] for command, *_ in told.values() for _ in range(8)]
    drives = controller(paths, env, [[skill] for skill in range(len(told)) for _ in range(8)], [[0]] * rows, commands)
    velocities = {name: [] for _, name, _ in told.values()}
    for _ in range(160):
        state = env.step(state.set("action", drives(state["physics"], state["measurements"])))["next"]
        measured = env.named(state["measurements"])
        for name, seen in velocities.items():
            seen.append(measured[name])
    assert (measured["head_height"] > 1.2).view(-1, 8).sum(1).min() >= 6
    for place, (policy, (_, name, least)) in enumerate(told.items()):
        found = torch.stack(velocities[name])[80:].mean(0)[8 * place : 8 * place + 8].median()
        assert found / least > 1, policy


def test_the_shipped_riser_gets_up_and_stays():
    """Of those that lie or are dropped, most stand after ten seconds."""
    path = BEHAVIOURS / "humanoid" / "get_up_late.safetensors"
    start = partial(start_anywhere, shares={"reset": 0.5, "lying": 0.5})
    env = BatchedMujocoEnv("humanoid", num_envs=24, start=start, seed=0)
    state = env.reset()
    drives = controller([path], env, [[0]] * 24, [[0]] * 24)
    for _ in range(400):
        state = env.step(state.set("action", drives(state["physics"], state["measurements"])))["next"]
    measured = env.named(state["measurements"])
    assert ((measured["head_height"] > 1.2) & (measured["torso_upright"] > 0.8)).sum() >= 16
