import math

import pytest
import torch
from tensordict import TensorDict

from datamodules.environments.swirl import (
    EPISODE_LENGTH,
    GOALS,
    STEP,
    Swirl,
    SwirlEnv,
    SwirlTask,
    random_return,
    rotated,
)


def test_vectors_are_turned_counterclockwise():
    east, quarter = torch.tensor([[1.0, 0.0]]), torch.tensor([math.pi / 2])
    torch.testing.assert_close(rotated(east, quarter), torch.tensor([[0.0, 1.0]]), atol=1e-6, rtol=0)


def test_steering_leads_straight_to_the_goal_and_stops_there():
    world, goal = Swirl(7.0), torch.tensor([GOALS["goal_3"]])
    position = torch.tensor([[0.05, -0.02]])
    distances = [(goal - position).norm().item()]
    for _ in range(EPISODE_LENGTH):
        position = world.move(position, world.steer(position, goal))
        distances.append((goal - position).norm().item())
    expected = [max(0.0, distances[0] - step * STEP) for step in range(EPISODE_LENGTH + 1)]
    assert distances == pytest.approx(expected, abs=1e-4)


def test_the_angle_winds_and_the_frequency_says_how_fast():
    position = 2 * torch.rand(2000, 2) - 1
    near = position + 0.01 * torch.randn(2000, 2)
    changes = [(Swirl(f).turn(position) - Swirl(f).turn(near)).abs().mean().item() for f in (3.5, 7.0)]
    assert changes[1] / changes[0] == pytest.approx(2.0, rel=0.05)
    assert Swirl(7.0).turn(position).std() > 1


def expert(env: SwirlEnv, goal: str):
    """Where it is, it is told by the environment."""

    def act(seen: TensorDict) -> TensorDict:
        position = env._state[:, :2]
        return seen.set("action", env.world.steer(position, torch.tensor([GOALS[goal]])))

    return act


def test_scores_of_the_expert_and_of_random_actions():
    made = []

    def make_env(rows: int) -> SwirlEnv:
        made.append(SwirlEnv(rows, seed=3))
        return made[-1]

    task = SwirlTask("swirl", {"goal": "goal_1"}, make_env, 64)
    assert task.metric_names == ["swirl/goal/score", "swirl/goal/return"]
    result = task.run(lambda seen: expert(made[-1], "goal_1")(seen))
    metrics = task.metrics(result)
    assert metrics["swirl/goal/score"] == pytest.approx([100.0] * 64, abs=0.05)
    assert all(13 < value < 19 for value in metrics["swirl/goal/return"])
    assert abs(random_return(Swirl(7.0), torch.tensor(GOALS["goal_1"]))) < 0.5
    generator = torch.Generator().manual_seed(0)
    result = task.run(lambda seen: seen.set("action", 2 * torch.rand(64, 2, generator=generator) - 1))
    assert abs(sum(task.metrics(result)["swirl/goal/score"]) / 64) < 5
    other = SwirlTask("swirl", {"east": "x"}, make_env, 2)
    assert other.metric_names == ["swirl/east/return"]


def test_rewards_are_those_of_arriving_and_can_be_computed_later():
    env = SwirlEnv(5, seed=1)
    state = env.reset()
    state["action"] = 2 * torch.rand(5, 2) - 1
    step = env.step(state)["next"]
    x, y = GOALS["goal_2"]
    before, after = ((each["measurements"][:, :2] - torch.tensor([x, y])).norm(dim=-1) for each in (state, step))
    rewards = env.rewards(env.relabel(step["physics"], state["action"]), ["goal_2"])
    torch.testing.assert_close(rewards[:, 0], (before - after) / STEP, atol=1e-4, rtol=1e-4)


def test_it_goes_on_where_it_was():
    env, other = SwirlEnv(3, seed=1), SwirlEnv(3, seed=2)
    state = env.reset()
    state["action"] = torch.ones(3, 2)
    env.step(state)
    other.set_extra_state(env.get_extra_state())
    assert torch.equal(other.reset()["observation"], env.current()["observation"])
    picture = env.render(0, 160, 160)
    assert picture.shape == (160, 160, 3)
    assert picture.min() == 0
    assert picture.max() == 255
