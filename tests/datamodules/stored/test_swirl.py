import torch

from datamodules.environments.swirl import GOALS, SwirlEnv
from datamodules.stored.swirl import swirl_dataset


def test_every_episode_is_one_of_its_goal_and_the_skilled_ones_get_there():
    dataset = swirl_dataset(50)
    assert (len(dataset), dataset.episodes) == (8 * 50 * 30, 400)
    assert not dataset.loose_ends()
    env = SwirlEnv(1)
    measured = env.measure(dataset.data)
    returns = dataset.episode_returns(env.rewards(measured, list(GOALS))).view(8, 50, 8)  # by source, and by goal
    own = returns.diagonal(dim1=0, dim2=2)
    assert (own.mean(0) > 5).all()
    assert (own.max(0).values > 14).all()
    opposite = torch.stack([returns[goal, :, (goal + 4) % 8] for goal in range(8)])
    assert (opposite.mean(1) < -3).all()


def test_its_transitions_are_those_of_the_world():
    data = swirl_dataset(2, seed=5).data
    env = SwirlEnv(1)
    start = data["next", "physics"][:, 2:].float()
    torch.testing.assert_close(env.world.move(start, data["action"]), data["next", "physics"][:, :2].float())
    torch.testing.assert_close(env.world.observe(start), data["observation"])
