import io

import mujoco
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs, step_mdp

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.simulation import BatchSimulation
from datamodules.environments.tasks import TASKS
from datamodules.pixels import RenderingUnavailable

suite = pytest.importorskip("dm_control.suite")  # after ours, which sets the graphics library for it

SUITE_TASKS = [
    *(("humanoid", task) for task in ("stand", "walk", "run")),
    *(("walker", task) for task in ("stand", "walk", "run")),
    ("cheetah", "run"),
    ("quadruped", "walk"),
    ("quadruped", "run"),
]


def default_posture(simulation: BatchSimulation, rows: int, generator: torch.Generator) -> np.ndarray:
    model = simulation.model
    return np.tile(np.concatenate([model.qpos0, np.zeros(model.nv + model.na)]), (rows, 1))


def flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in observation.values()])


def suite_trajectory(domain: str, task: str, steps: int) -> tuple[TensorDict, np.ndarray, np.ndarray]:
    """Transitions of dm_control under random actions, and the state and observation it began with."""
    environment = suite.load(domain, task, task_kwargs={"random": 3})
    spec = environment.action_spec()
    generator = np.random.default_rng(3)
    first = environment.reset()
    start, start_observation = environment.physics.get_state(), flat(first.observation)
    rows = []
    for _ in range(steps):
        action = generator.uniform(-1, 1, spec.shape).astype(np.float32)
        before = environment.physics.get_state()
        step = environment.step(spec.minimum + (spec.maximum - spec.minimum) * (action.astype(np.float64) + 1) / 2)
        after = environment.physics.get_state()
        arrays = (before, action, after, flat(step.observation), np.array([step.reward]))
        names = ("before", "action", "after", "observation", "reward")
        rows.append(TensorDict({name: torch.from_numpy(array) for name, array in zip(names, arrays)}))
    return torch.stack(rows), start, start_observation


def run(environment: BatchedMujocoEnv, steps: int, seed: int = 0) -> TensorDict:
    """Random actions from where the environment is now, with resets; [n, steps]."""
    generator = torch.Generator().manual_seed(seed)
    current, rows = environment.current(), []
    for _ in range(steps):
        shape = environment.action_spec.shape
        current["action"] = 2 * torch.rand(shape, generator=generator) - 1
        stepped, current = environment.step_and_maybe_reset(current)
        rows.append(stepped.clone())
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("domain", "task"), SUITE_TASKS)
def test_steps_equal_dm_control(domain: str, task: str) -> None:
    """Every transition of the suite's trajectory is one row of a single batched step."""
    steps = 80
    trajectory, start, start_observation = suite_trajectory(domain, task, steps)
    environment = BatchedMujocoEnv(domain, task, steps)
    environment.reset()
    environment.set_physics(trajectory["before"])
    arrival = environment.step(environment.current().set("action", trajectory["action"]))["next"]
    # The suite warm-starts its contact solver from the previous step, we never do: 1e-13 here, more with contacts that
    # the solver finds hard. Observations and rewards are float32 here, float64 there.
    torch.testing.assert_close(arrival["physics"], trajectory["after"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(arrival["observation"].double(), trajectory["observation"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(arrival["reward"].double(), trajectory["reward"], rtol=1e-6, atol=1e-6)
    observed = environment.observe(torch.from_numpy(start)[None])[0].double()
    torch.testing.assert_close(observed, torch.from_numpy(start_observation), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("domain", TASKS)
def test_torchrl_contract(domain: str) -> None:
    environment = BatchedMujocoEnv(domain, next(iter(TASKS[domain])), 3, episode_length=4)
    check_env_specs(environment)
    rollout = environment.rollout(10, break_when_any_done=False)
    assert rollout["next", "truncated"].sum() == 3 * 2
    assert not rollout["next", "terminated"].any()
    assert rollout["physics"].dtype == torch.float64


@pytest.mark.parametrize("domain", TASKS)
def test_relabelling_gives_the_environments_own_numbers(domain: str) -> None:
    task = next(iter(TASKS[domain]))
    environment = BatchedMujocoEnv(domain, task, 8)
    rollout = environment.rollout(20).flatten(0, 1)
    measurements = environment.relabel(rollout["next", "physics"], rollout["action"])
    assert torch.equal(measurements, rollout["next", "measurements"])
    assert torch.equal(environment.rewards(measurements, [task]), rollout["next", "reward"])


def test_relabelling_needs_the_action() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 8, start=default_posture)
    rollout = environment.rollout(5).flatten(0, 1)
    without = environment.relabel(rollout["next", "physics"], torch.zeros_like(rollout["action"]))
    assert (environment.rewards(without, ["stand"]) - rollout["next", "reward"]).abs().max() > 0.01


def test_observe_restores_stored_observations() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 8)
    rollout = environment.rollout(10).flatten(0, 1)
    assert torch.equal(environment.observe(rollout["next", "physics"]), rollout["next", "observation"])


def test_same_seed_same_trajectory_whatever_the_threads() -> None:
    runs = []
    for seed, threads in ((7, 1), (7, 2), (8, 2)):
        environment = BatchedMujocoEnv("humanoid", "walk", 6, seed=seed, num_threads=threads, episode_length=9)
        environment.reset()
        runs.append(run(environment, 20))
    assert (runs[0] == runs[1]).all()
    assert not torch.equal(runs[0]["physics"], runs[2]["physics"])


def test_rows_do_not_influence_each_other() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 5)
    environment.reset()
    rollout = run(environment, 10)
    alone = BatchedMujocoEnv("humanoid", "stand", 1)
    alone.reset()
    alone.set_physics(rollout["physics"][3, :1])
    for step in range(10):
        arrival = alone.step(alone.current().set("action", rollout["action"][3:4, step]))["next"]
        assert torch.equal(arrival["physics"], rollout["next", "physics"][3:4, step])


@pytest.mark.parametrize("domain", ["humanoid", "quadruped"])
def test_state_dict_continues_exactly(domain: str) -> None:
    make = lambda seed: BatchedMujocoEnv(domain, "stand", 4, episode_length=12, seed=seed)  # noqa: E731
    first = make(0)
    first.reset()
    run(first, 7)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    expected = run(first, 20, seed=1)  # crosses the end of the episode, so resets are drawn too

    second = make(99)
    second.reset()
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert (run(second, 20, seed=1) == expected).all()


def test_state_of_another_environment_is_refused() -> None:
    state = BatchedMujocoEnv("humanoid", "stand", 4).state_dict()
    with pytest.raises(ValueError, match=r"'physics' has shape \(4, 55\), but \(2, 18\) was expected"):
        BatchedMujocoEnv("walker", "stand", 2).load_state_dict(state)


def test_partial_reset_touches_only_its_rows() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 5)
    environment.reset()
    run(environment, 3)
    before = environment.current().clone()
    mask = torch.tensor([[False], [True], [False], [True], [False]])
    after = environment.reset(before.clone().set("_reset", mask))
    for key in ("observation", "physics", "measurements"):
        changed = (before[key] != after[key]).any(dim=1)
        assert torch.equal(changed, mask[:, 0])
    assert environment._steps[:, 0].tolist() == [3, 0, 3, 0, 3]


def test_batches_given_out_are_never_changed_later() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 3)
    given = environment.reset()
    kept = given.clone()
    run(environment, 2)
    environment.reset()
    assert (given == kept).all()


def test_collector_drives_it_as_one_batched_environment() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 4, episode_length=5)
    policy = TensorDictModule(torch.nn.Linear(67, 21), in_keys=["observation"], out_keys=["action"])
    with pytest.warns(FutureWarning, match="InitTracker"):
        collector = Collector(environment, policy, frames_per_batch=48, total_frames=48)
    (batch,) = list(collector)
    assert batch.shape == (4, 12)
    assert batch["next", "done"].sum() == 4 * 2
    starts = batch["physics"][:, 5]
    assert not torch.equal(starts, batch["next", "physics"][:, 4])
    collector.shutdown()


def test_random_starts_touch_nothing_and_differ() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 64)
    qpos = environment.reset()["physics"].numpy()[:, :28]
    assert not environment.simulation.touches(qpos).any()
    assert len(np.unique(qpos, axis=0)) == 64
    np.testing.assert_allclose(np.linalg.norm(qpos[:, 3:7], axis=1), 1, rtol=1e-12)


def test_starts_from_a_function_and_depends_on_the_seed_alone() -> None:
    def start(simulation: BatchSimulation, rows: int, generator: torch.Generator) -> np.ndarray:
        states = default_posture(simulation, rows, generator)
        return states + 0.01 * torch.rand(states.shape, generator=generator, dtype=torch.float64).numpy()

    one, same, other = (BatchedMujocoEnv("humanoid", "stand", 4, start=start, seed=s).reset() for s in (1, 1, 2))
    assert torch.equal(one["physics"], same["physics"])
    assert not torch.equal(one["physics"], other["physics"])
    assert one["measurements"].isfinite().all()


def breaks_down(simulation: BatchSimulation, physics: torch.Tensor, substeps: int) -> bool:
    """Whether MuJoCo counts a state [p] as broken within so many steps without control, or what they lead to."""
    model, data = simulation.model, mujoco.MjData(simulation.model)
    state = mujoco.mjtState.mjSTATE_FULLPHYSICS
    mujoco.mj_setState(model, data, np.concatenate([[0.0], physics.numpy()]), state)
    mujoco.mj_step(model, data, substeps)
    mujoco.mj_checkPos(model, data)
    mujoco.mj_checkVel(model, data)
    kinds = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
    return any(data.warning[kind].number for kind in kinds)


@pytest.mark.parametrize("action_repeat", [1, 2])
@pytest.mark.parametrize("domain", TASKS)
def test_simulation_that_breaks_down_is_truncated_where_it_was_sound(domain: str, action_repeat: int, capfd) -> None:
    """MuJoCo goes on from the model's first pose: what arrives must be the last sound state, and what is seen there."""
    speeds = torch.tensor([1e2, 1e5, 1e7, 1e10], dtype=torch.float64)  # and one row that goes on as it was
    environment = BatchedMujocoEnv(domain, num_envs=5, start=default_posture, action_repeat=action_repeat)
    environment.reset()
    idle = torch.zeros(environment.action_spec.shape)
    for _ in range(2):  # contact forces of the middle of an episode
        sound = environment.step(environment.current().set("action", idle))["next"]
    model = environment.simulation.model
    sound["physics"][1:, model.nq : model.nq + model.nv] = speeds[:, None]
    environment.set_physics(sound["physics"])
    began = environment.current().clone()
    arrival = environment.step(environment.current().set("action", idle))["next"]

    substeps = environment.domain.substeps
    expected, at_once = [
        torch.tensor([breaks_down(environment.simulation, physics, steps) for physics in began["physics"]])
        for steps in (substeps * action_repeat, substeps)
    ]
    assert expected[-1]
    assert not expected[0]
    assert torch.equal(arrival["truncated"][:, 0], expected)
    assert not arrival["terminated"].any()
    assert (arrival["physics"] != began["physics"])[1:].any(1).tolist() == (~at_once)[1:].tolist()
    for key in ("physics", "observation"):
        assert torch.equal(arrival[key][at_once], began[key][at_once])
    measured = environment.relabel(arrival["physics"], idle)
    assert torch.equal(arrival["measurements"], measured)
    assert all(value.isfinite().all() for value in arrival.values(True, True))
    assert capfd.readouterr() == ("", "")


def test_states_beyond_the_simulators_limits_are_refused() -> None:
    environment = BatchedMujocoEnv("cheetah")
    for value in (2e10, torch.nan):
        with pytest.raises(ValueError, match=r"not finite, or beyond MuJoCo's limit of 1e\+10"):
            environment.relabel(torch.full((1, 18), value), torch.zeros(1, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "horse"}, "^domain=horse: expected one of humanoid, walker"),
        ({"task": "fly"}, "^task=fly: Unknown task 'fly' of humanoid: expected one of stand, walk, run"),
        ({"task": "head_heigth > 1"}, "unknown name 'head_heigth'"),
        ({"task": "control"}, "vector per row"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchedMujocoEnv(**({"domain": "humanoid"} | arguments))


def test_actions_must_be_finite() -> None:
    environment = BatchedMujocoEnv("walker", "stand", 1)
    with pytest.raises(ValueError, match="not finite"):
        environment.step(environment.reset().set("action", torch.full((1, 6), torch.nan)))


def test_any_expression_is_a_task() -> None:
    environment = BatchedMujocoEnv("humanoid", "tolerance(head_height, 0, 1, 0.1) * torso_upright", 2)
    arrival = environment.rollout(2)["next"]
    named = environment.named(arrival["measurements"].flatten(0, 1))
    assert named["control"].shape == (4, 21)
    assert named["head_height"].shape == (4,)


def test_maze_walls_stop_the_mass() -> None:
    environment = BatchedMujocoEnv("point_mass_maze", "reach_top_right", 1)
    environment.reset()
    environment.set_physics(torch.tensor([[-0.15, 0.05, 0.0, 0.0]]))
    for _ in range(200):  # straight at the wall between the two upper rooms
        current = environment.current().set("action", torch.tensor([[1.0, 0.0]]))
        arrival = environment.step(current)["next"]
    assert -0.03 < arrival["physics"][0, 0] < 0


def test_picture() -> None:
    environment = BatchedMujocoEnv("humanoid", "stand", 2, start=default_posture)
    environment.reset()
    try:
        picture = environment.render(row=1, width=64, height=48)
    except RenderingUnavailable as error:
        pytest.skip(str(error))
    assert picture.shape == (48, 64, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 5


def test_held_actions_sum_rewards_and_show_every_step():
    torch.manual_seed(0)
    single = BatchedMujocoEnv("cheetah", "run", 3, seed=1, episode_length=10)
    held = BatchedMujocoEnv("cheetah", "run", 3, seed=1, episode_length=10, action_repeat=2)
    assert held.step_seconds == 2 * single.step_seconds
    check_env_specs(held)
    for env in (single, held):
        env.set_seed(1)
    state, state_held = single.reset(), held.reset()
    assert all(
        value.is_contiguous() for value in state_held.values(True, True)
    )  # collectors write into a step's memory
    for _ in range(5):
        action = 2 * torch.rand(3, 6) - 1
        rewards, measurements = [], []
        for _ in range(2):
            stepped = single.step(state.set("action", action))
            rewards.append(stepped["next", "reward"])
            measurements.append(stepped["next", "measurements"])
            state = step_mdp(stepped)
        stepped_held = held.step(state_held.set("action", action))
        assert torch.equal(stepped_held["next", "reward"], sum(rewards))
        assert torch.equal(stepped_held["next", "passed"], torch.stack(measurements, 1))
        for key in ("observation", "physics", "measurements", "truncated"):
            assert torch.equal(stepped_held["next", key], stepped["next", key])
        state_held = step_mdp(stepped_held)
    assert stepped_held["next", "truncated"].all()
