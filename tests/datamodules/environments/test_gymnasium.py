import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import FlattenObservation
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs, step_mdp

from datamodules.environments.gymnasium import D4RL_BODIES, GymnasiumEnv


def random_actions(env: GymnasiumEnv, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return 2 * torch.rand(steps, *env.action_spec.shape, generator=generator) - 1


def play(env: GymnasiumEnv, state: TensorDict, actions: torch.Tensor) -> TensorDict:
    """The steps [n, steps] that the actions make, without resets."""
    steps = []
    for action in actions:
        state["action"] = action
        steps.append(env.step(state)["next"].clone())
        state = step_mdp(state)
    return torch.stack(steps, 1)


class Walk(gymnasium.Env):
    """A point that goes where it is told: (position, step) in a dictionary."""

    observation_space = gymnasium.spaces.Dict(
        position=gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64), steps=gymnasium.spaces.Discrete(3)
    )
    action_space = gymnasium.spaces.Box(np.array([-1.0]), np.array([5.0]))
    episodes = 0

    def __init__(self, start: float = 0.0, remembers: bool = False) -> None:
        self.start, self.remembers = start, remembers

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Walk.episodes += 1
        self.position, self.steps = self.start + self.np_random.random() + self.remembers * Walk.episodes, 0
        return self._seen(), {}

    def step(self, action):
        self.steps += 1
        self.position += float(action[0])
        return self._seen(), float(action[0]), False, False, {}

    def _seen(self):
        return {"position": np.array([self.position]), "steps": self.steps % 3}


def walk(num_envs: int = 1, episode_length: int = 10, **settings) -> GymnasiumEnv:
    return GymnasiumEnv(Walk, num_envs, episode_length=episode_length, wrappers=[FlattenObservation], **settings)


TASKS = [*D4RL_BODIES.values(), "Pendulum-v1", "MountainCarContinuous-v0", "Reacher-v5"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_gymnasium(name):
    env = GymnasiumEnv(name, num_envs=2, seed=3)
    start = env.reset()
    actions = random_actions(env, 60)
    steps = play(env, start.clone(), actions)
    own = gymnasium.make(name)
    for row in range(2):
        observation, _ = own.reset(seed=int(env._seeds[row]))
        assert np.array_equal(start["observation"][row], observation.astype(np.float32))
        for t in range(len(actions)):
            low, high = own.action_space.low, own.action_space.high
            action = (low + high) / 2 + (high - low) / 2 * actions[t, row].numpy()
            observation, reward, terminated, truncated, _ = own.step(action)
            found = steps[row, t]
            assert np.array_equal(found["observation"], observation.astype(np.float32))
            assert found["reward"].item() == np.float32(reward)
            assert found["terminated"].item() == terminated
            assert found["truncated"].item() == (truncated and not terminated)
            if terminated or truncated:
                break


def test_time_limits_are_the_tasks_own_or_those_asked_for():
    assert [GymnasiumEnv(name).episode_length for name in ("Pendulum-v1", "Reacher-v5", "Hopper-v4")] == [200, 50, 1000]
    steps = play(env := GymnasiumEnv("Reacher-v5"), env.reset(), random_actions(env, 51))
    assert steps["truncated"][0, :, 0].tolist() == [False] * 49 + [True] * 2
    assert GymnasiumEnv("Pendulum-v1", episode_length=300).episode_length == 300


def test_an_environment_of_ones_own_with_options_and_wrappers():
    env = walk(num_envs=2, options={"start": 7.0}, episode_length=3)
    state = env.reset()
    assert ((state["observation"][:, 0] >= 7) & (state["observation"][:, 0] < 8)).all()
    steps = play(env, state, torch.tensor([-1.0, 0.0, 1.0, 0.5]).view(4, 1, 1).expand(4, 2, 1))
    assert steps["reward"][0, :, 0].tolist() == [-1, 2, 5, 0]  # the range is [-1, 5]; the last comes after the end
    assert steps["observation"][0, :, 1:].argmax(-1).tolist() == [1, 2, 0, 0]  # one place for each of three values
    assert steps["truncated"][0, :, 0].tolist() == [False, False, True, True]
    assert env.domain_name == "walk"
    beyond = play(env, env.reset(), torch.full((1, 2, 1), 3.0))
    assert beyond["reward"].flatten().tolist() == [5, 5]


def test_episodes_that_cannot_be_made_again_begin_anew_and_that_is_said(capsys):
    state = {}
    for remembers in (False, True):
        env = walk(num_envs=3, options={"remembers": remembers}, seed=1)
        play(env, env.reset(), random_actions(env, 4))
        saved, state[remembers] = env.get_extra_state(), env.current()["observation"].clone()
        other = walk(num_envs=3, options={"remembers": remembers}, seed=2)
        other.reset()
        other.set_extra_state(saved)
        assert other.began_anew.tolist() == [remembers] * 3
        assert torch.equal(other.reset()["observation"], state[remembers]) != remembers
        assert (other._steps == (0 if remembers else 4)).all()
        said = capsys.readouterr().out
        assert said.count("\n") == remembers
        assert ("3 of 3 episodes of walk can't go on where they were and begin anew" in said) == remembers


@pytest.mark.parametrize("name", [*D4RL_BODIES.values(), "InvertedDoublePendulum-v5"])
def test_simulation_that_breaks_down_is_truncated_where_it_was_sound(name, capfd):
    """MuJoCo goes on from the model's first pose, which is what the task sees."""
    env = GymnasiumEnv(name, num_envs=3)
    env.reset()
    fast = env.current()["physics"].clone()
    nq = env._envs[0].unwrapped.model.nq
    fast[1, nq:] = 1e9
    env.set_physics(fast)
    began = env.current().clone()
    steps = play(env, env.current(), random_actions(env, 2))
    for t in range(2):
        assert steps["truncated"][1, t].item()
        assert not steps["terminated"][1, t].item()
        assert steps["reward"][1, t].item() == 0
        for key in ("physics", "observation"):
            assert torch.equal(steps[key][1, t], began[key][1])
    assert not steps["truncated"][[0, 2]].any()
    assert (steps["physics"][[0, 2], 0] != fast[[0, 2]]).any(1).all()
    assert not env.reset()["done"].any()
    assert not play(env, env.current(), random_actions(env, 1))["truncated"].any()
    assert capfd.readouterr() == ("", "")


class Faulty(gymnasium.Env):
    """Gives one number that is not finite, in the step that is asked for, 0 for the reset."""

    def __init__(self, name: str = "", step: int = 0, number: float = 0.0, size: int = 3, acts: int = 1) -> None:
        self.fault = name, step, number
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1, 1, (acts,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._given("observation", np.zeros(3)), {}

    def step(self, action):
        self.steps += 1
        return self._given("observation", np.zeros(3)), self._given("reward", np.ones(1))[0], False, False, {}

    def _given(self, name, values):
        if self.fault[:2] == (name, self.steps):
            values[-1] = self.fault[2]
        return values


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (("observation", 0, np.nan), r"observation\[2\]=nan after step 0"),
        (("observation", 2, -np.inf), r"observation\[2\]=-inf after step 2"),
        (("reward", 2, np.nan), "reward=nan after step 2"),
        (("reward", 1, 1e39), r"reward=1e\+39 after step 1"),  # no float32
    ],
)
def test_numbers_of_a_task_that_are_not_finite_are_an_error_and_no_end_of_an_episode(fault, found):
    env = GymnasiumEnv(Faulty, episode_length=5, options=dict(zip(("name", "step", "number"), fault)))
    with pytest.raises(
        ValueError, match=f"^environment.id=Faulty: expected finite numbers, found {found} of the ep.* seed \\d+$"
    ):
        play(env, env.reset(), torch.ones(3, 1, 1))


def test_a_mujoco_task_whose_simulation_is_sound_is_no_exception():
    env = GymnasiumEnv("InvertedPendulum-v5", options={"reset_noise_scale": 0.0})
    env._envs[0].unwrapped.step = lambda action: (np.full(4, np.nan), 1.0, False, False, {})
    with pytest.raises(ValueError, match=r"found observation\[0\]=nan after step 1"):
        play(env, env.reset(), torch.ones(1, 1, 1))


def test_actions_that_are_not_finite_are_refused():
    env = walk()
    with pytest.raises(ValueError, match="an action for walk is not finite"):
        play(env, env.reset(), torch.full((1, 1, 1), torch.nan))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "Pendulm-v1"}, "environment.id=Pendulm-v1: Environment `Pendulm` doesn't exist. Did you mean: `Pendul"),
        ({"id": "CartPole-v1"}, r"CartPole-v1: expected continuous actions .* found Discrete\."),
        ({"id": Walk, "episode_length": 5}, r"Walk: expected observations of one dimension \(Box\), found Dict;"),
        ({"id": Walk, "wrappers": [FlattenObservation]}, "episode_length=null: expected .*, for Walk has no limit"),
        ({"id": Faulty, "options": {"size": 0}, "episode_length": 5}, r"expected observations of .*, found Box\[0\];"),
        (
            {"id": Faulty, "options": {"acts": 0}, "episode_length": 5},
            r"expected continuous actions .*, found Box\[0\]\.",
        ),
        (
            {"id": "Pendulum-v1", "options": {"mass": 1}},
            r"^environment\.options\.mass: expected an option of Pendulum-v1, found another",
        ),
        (
            {"id": "Pendulum-v1", "options": {"render_mode": "human"}},
            r"^environment\.options\.render_mode=human: expected",
        ),
        ({"id": "Reacher-v2"}, r"^environment\.id=Reacher-v2: The mujoco v2 and v3 based environments have been moved"),
        ({"id": "hopper-v5"}, "environment.id=hopper-v5: Environment `hopper` doesn't exist"),
        ({"id": Walk()}, "environment.id: expected the name of a task, or what makes one, found Walk;"),
        ({"id": "antigravity:Cave-v0"}, "expected a task of a module that is imported already, found antigravity"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        GymnasiumEnv(**settings)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("sizes", "name"), [(([0], 0, 1), "observations"), (([2, 0], 0, 1), "obs"), (([2], 0, 0), "act")]
)
def test_environments_without_anything_to_see_or_do_are_refused(sizes, name):
    with pytest.raises(ValueError, match=rf"^datamodule\.environment: expected {name}.*, found \[(2, )?0\]\.$"):
        walk().declare_specs(*sizes)


@pytest.mark.parametrize("name", ["hopper", "hopper-medium-replay-v2"])
def test_the_body_of_a_d4rl_data_set(name):
    assert GymnasiumEnv(name).name == "Hopper-v4"


def test_specs():
    check_env_specs(GymnasiumEnv("walker2d-medium-expert-v2", num_envs=2))


def test_a_fallen_row_waits_without_reward():
    env = GymnasiumEnv("hopper", num_envs=4, seed=0)
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
    env = GymnasiumEnv("halfcheetah", num_envs=2, episode_length=5)
    steps = play(env, env.reset(), random_actions(env, 7))
    assert steps["truncated"].squeeze(-1).long().tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 2
    assert not steps["terminated"].any()
    assert torch.equal(steps["done"], steps["truncated"])


def test_starts_follow_the_seed():
    starts = [GymnasiumEnv("hopper", num_envs=2, seed=seed).reset()["physics"] for seed in (1, 1, 2)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0][0], starts[0][1])


def test_stored_states_can_be_entered_again():
    env = GymnasiumEnv("walker2d", num_envs=2, seed=0)
    steps = play(env, env.reset(), random_actions(env, 5))
    env.set_physics(steps["physics"][:, 2])
    state = env.current()
    assert torch.equal(state["physics"], steps["physics"][:, 2])
    torch.testing.assert_close(state["observation"], steps["observation"][:, 2])
    assert not state["done"].any()


def test_rewards_are_the_stored_ones():
    env = GymnasiumEnv("hopper")
    reward = torch.tensor([[1.5], [-2.0]])
    stored = TensorDict({"next": {"reward": reward}}, batch_size=[2])
    assert torch.equal(env.rewards(env.measure(stored), ["reward", "2 * reward"]), torch.cat([reward, 2 * reward], 1))
    with pytest.raises(ValueError, match="can't be recomputed"):
        env.relabel(torch.zeros(1, 12), torch.zeros(1, 3))
