import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs, step_mdp

from datamodules.environments.pixel_control import PixelControlEnv
from datamodules.pixels import workers

PUBLISHED = [  # twelve "medium" tasks and three "hard" ones
    "acrobot/swingup",
    "cartpole/swingup_sparse",
    "cheetah/run",
    "finger/turn_easy",
    "finger/turn_hard",
    "hopper/hop",
    "quadruped/run",
    "quadruped/walk",
    "manipulation/reach_duplo",
    "reacher/easy",
    "reacher/hard",
    "walker/run",
    "humanoid/stand",
    "humanoid/walk",
    "humanoid/run",
]


def made(name: str = "cheetah/run", num_envs: int = 2, **settings) -> PixelControlEnv:
    return PixelControlEnv(*name.split("/"), num_envs, **{"size": 24, **settings})


def actions(env: PixelControlEnv, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, *env.action_spec.shape, generator=generator) - 1


def dm_control_env(env: PixelControlEnv):
    """The environment behind the only row, which lives in this process."""
    return workers._objects[env._episodes._number, 0]._env


def roll(env: PixelControlEnv, state, chosen: torch.Tensor) -> list:
    """What `env.step` gives for these actions, one after the other."""
    steps = []
    for action in chosen:
        stepped = env.step(state.clone().set("action", action))
        steps.append(stepped["next"].clone())
        state = step_mdp(stepped)
    return steps


def test_specs():
    check_env_specs(made())


def test_stacks_begin_with_copies_and_move_by_one_picture():
    env = made(size=32, frame_stack=3)
    state = env.reset()
    before = state["observation"]
    assert before.shape == (2, 9, 32, 32)
    assert before.dtype == torch.uint8
    assert torch.equal(before[:, :3], before[:, 3:6])
    assert torch.equal(before[:, :3], before[:, 6:])
    for step in roll(env, state, actions(env, 3)):
        assert torch.equal(step["observation"][:, :6], before[:, 3:])
        assert not torch.equal(step["observation"][:, 6:], before[:, 6:])
        before = step["observation"]


def test_an_action_is_held_and_its_rewards_are_summed():
    held, single = made(num_envs=1, action_repeat=4), made(num_envs=1, action_repeat=1)
    chosen = actions(held, 3)
    coarse = roll(held, held.reset(), chosen)
    fine = roll(single, single.reset(), chosen.repeat_interleave(4, 0))
    for index, step in enumerate(coarse):
        assert torch.equal(step["physics"], fine[4 * index + 3]["physics"])
        expected = sum(each["reward"].double() for each in fine[4 * index : 4 * index + 4])
        torch.testing.assert_close(step["reward"].double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(step["measurements"], step["reward"])
    assert held.step_seconds == pytest.approx(4 * single.step_seconds)


def test_episodes_are_truncated_by_time_and_begin_anew():
    env = made(action_repeat=2, episode_length=7)
    state = env.reset()
    steps = roll(env, state, actions(env, 5))
    assert [step["truncated"].all().item() for step in steps] == [False, False, False, True, True]
    assert not any(step["terminated"].any() for step in steps)
    assert not steps[4]["reward"].any()  # over: it stays where it is
    assert torch.equal(steps[4]["physics"], steps[3]["physics"])
    again = env.reset()
    assert not again["truncated"].any()
    assert not torch.equal(again["physics"], state["physics"])
    collected = env.rollout(6, auto_reset=True, break_when_any_done=False)
    assert collected["next", "truncated"][0, :, 0].tolist() == [False, False, False, True, False, False]


def test_terminations_are_told_from_truncations():
    env = made("stacker/stack_2", num_envs=1)
    dm_control_env(env).task.get_termination = lambda physics: 0.0
    (step,) = roll(env, env.reset(), actions(env, 1))
    assert step["terminated"].all()
    assert not step["truncated"].any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_task_goes_on_bit_for_bit_whatever_its_environment_did_before(name):
    env = made(name)
    state = env.reset()
    roll(env, state, actions(env, 4))
    saved = env.get_extra_state()
    other = made(name, seed=9)
    roll(other, other.reset(), actions(other, 3, seed=5))
    other.set_extra_state(saved)
    state, restored = env.current(), other.reset()  # the first reset goes on
    for chosen in (actions(env, 3, seed=1), None, actions(env, 2, seed=2)):
        if chosen is None:
            state, restored = env.reset(), other.reset()
            continue
        for one, another in zip(roll(env, state, chosen), roll(other, restored, chosen)):
            for key in ("observation", "physics", "reward", "truncated"):
                assert torch.equal(one[key], another[key]), key


def test_starts_depend_on_the_seed_alone_and_rows_differ():
    first = made(seed=3).reset()
    assert torch.equal(made(seed=3).reset()["physics"], first["physics"])
    assert not torch.equal(first["physics"][0], first["physics"][1])
    assert not torch.equal(made(seed=4).reset()["physics"], first["physics"])


@pytest.mark.parametrize("count", [2, 3])
def test_episodes_are_the_same_however_many_processes_draw(count):
    """Steps, ends, resets of some, restored states and states that are set."""

    def seen(workers: int) -> list:
        env = made(num_envs=3, render_workers=workers, action_repeat=2, episode_length=6)
        state = env.reset()
        found = [state, *roll(env, state, actions(env, 2))]
        saved = env.get_extra_state()
        found += roll(env, env.current(), actions(env, 2, seed=1))
        state["_reset"] = torch.tensor([[True], [False], [True]])
        found += [env.reset(state).clone(), *roll(env, env.current(), actions(env, 1, seed=2))]
        other = made(num_envs=3, render_workers=workers, action_repeat=2, episode_length=6, seed=9)
        other.set_extra_state(saved)
        found += [other.reset(), *roll(other, other.current(), actions(env, 2, seed=3))]
        other.set_physics(found[0]["physics"][[2, 0]], rows=[0, 2])
        return [*found, other.current(), *roll(other, other.current(), actions(env, 1, seed=4))]

    for one, another in zip(seen(1), seen(count), strict=True):
        for key in {"observation", "physics", "done", "terminated", "truncated", "measurements", "reward"} & one.keys():
            assert torch.equal(one[key], another[key]), key


def test_pictures_are_those_of_the_suite_but_for_effects():
    def picture(effects: bool) -> tuple[PixelControlEnv, np.ndarray]:
        env = made("reacher/easy", num_envs=1, size=64, effects=effects)
        return env, env.reset()["observation"][0, -3:].permute(1, 2, 0).numpy().astype(int)

    env, own = picture(effects=True)
    render = partial(dm_control_env(env).physics.render, 64, 64, camera_id=0)
    theirs = workers._thread(os.getpid()).executor.submit(render).result().astype(int)
    assert np.abs(own - theirs).mean() < 1
    assert 1 < np.abs(picture(effects=False)[1] - theirs).mean() < 40


def test_supersampling_averages_finer_pictures():
    coarse = made("cartpole/balance", 1, size=24, supersampling=2).reset()["observation"]
    fine = made("cartpole/balance", 1, size=48).reset()["observation"]
    expected = fine.unflatten(2, (24, 2)).unflatten(4, (24, 2)).float().mean((3, 5))
    assert (coarse.float() - expected).abs().max() < 1


def test_states_can_be_looked_at():
    env, other = made("finger/turn_easy"), made("finger/turn_easy", num_envs=1, seed=7)
    env.reset()
    other.reset()
    state = roll(env, env.current(), actions(env, 3))[-1]
    other.set_physics(state["physics"][1:])
    assert np.array_equal(other.render(0, 80, 60), env.render(1, 80, 60))  # targets, which lie in the model, too
    assert other.render(0, 80, 60).shape == (60, 80, 3)
    assert torch.equal(other.current()["physics"], state["physics"][1:])
    assert torch.equal(other.current()["observation"][0, -3:], state["observation"][1, -3:])


def test_an_episode_that_is_over_goes_on_from_states_that_are_set():
    env = made(action_repeat=2, episode_length=4)
    began = env.reset()
    ended = roll(env, began, actions(env, 2))[-1]
    assert ended["truncated"].all()
    env.set_physics(began["physics"])
    assert not env.current()["truncated"].any()
    (step,) = roll(env, env.current(), actions(env, 1))
    assert not torch.equal(step["physics"], began["physics"])
    with pytest.raises(AssertionError):
        env.get_extra_state()  # no seed and actions led there


@pytest.mark.parametrize("name", ["cheetah/run", "walker/run", "manipulation/reach_duplo"])
def test_simulation_that_breaks_down_is_truncated_where_it_was_sound(name, capfd):
    env = made(name, num_envs=1)
    env.reset()
    physics = dm_control_env(env).physics
    fast = env.current()["physics"].clone()
    fast[:, physics.model.nq : physics.model.nq + physics.model.nv] = 1e7
    env.set_physics(fast)
    began = env.current().clone()
    (step,) = roll(env, env.current(), actions(env, 1))
    assert step["truncated"].item()
    assert not step["terminated"].item()
    assert step["reward"].item() == 0
    assert torch.equal(step["physics"], began["physics"])
    assert torch.equal(step["observation"][:, -3:], began["observation"][:, -3:])
    assert capfd.readouterr() == ("", "")


def test_actions_must_be_finite():
    env = made(num_envs=1)
    with pytest.raises(ValueError, match="an action for cheetah_run is not finite"):
        env.step(env.reset().set("action", torch.full((1, 6), torch.nan)))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("cheetah", "walk"), {}, "environment cheetah/walk: expected task to be one of run"),
        (("cheeta", "run"), {}, "environment cheeta/run: expected domain to be one of .*cheetah"),
        (("manipulation", "reach"), {}, "expected task to be one of .*reach_duplo"),
        (("cheetah", "run"), {"size": 2049, "supersampling": 2}, "size=2049, supersampling=2: expected to draw at"),
        (("lqr", "lqr_2_1"), {}, "environment lqr/lqr_2_1: expected domain to be one of acrobot"),
    ],
)
def test_settings_that_make_no_sense_are_named(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        PixelControlEnv(*arguments, **settings)


@pytest.mark.parametrize(("camera", "known"), [("front", "side"), (9, "side")])
def test_unknown_camera_is_named(camera, known):
    with pytest.raises(ValueError, match=f"camera={camera}: expected one of .*{known}"):
        made(camera=camera).reset()


def test_a_program_that_drew_ends_without_a_word():
    script = (
        "import torch\n"
        "from datamodules.environments.pixel_control import PixelControlEnv\n"
        "env = PixelControlEnv('cheetah', 'run', 3, size=24, render_workers=2)\n"
        "env.reset()\n"
        "env.render(0, 32, 32)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
