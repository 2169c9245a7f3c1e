"""Data of the point whose steering is turned: episodes towards each of the goals, of every degree of skill."""

import torch
from tensordict import TensorDict

from components.buildable import buildable
from components.checks import NonNegative, Positive, Seed, Size, checked
from datamodules.environments.swirl import EPISODE_LENGTH, GOALS, START, Swirl
from datamodules.stored.transitions import TransitionDataset


@buildable()
@checked
def swirl_dataset(
    episodes: Size = 100, noise: NonNegative = 0.1, frequency: Positive = 7.0, world_seed: Seed = 0, seed: Seed = 0
) -> TransitionDataset:
    """So many episodes for each goal, which is their `source`.

    Every episode has a skill, uniform in [0, 1]. In each step it steers straight to its goal with that probability,
    with Gaussian noise, and takes a uniform action otherwise.

    Args:
        episodes: for each goal.
        noise: standard deviation of what is added to the action that steers.
        frequency, world_seed: of the world, see `Swirl`.
        seed: of skills, starts and actions.
    """
    world, generator = Swirl(frequency, world_seed), torch.Generator().manual_seed(seed)
    count = episodes * len(GOALS)
    goal = torch.tensor(list(GOALS.values())).repeat_interleave(episodes, 0)
    skill = torch.rand(count, 1, generator=generator)
    positions = [START * (2 * torch.rand(count, 2, generator=generator) - 1)]
    actions = []
    for _ in range(EPISODE_LENGTH):
        steered = world.steer(positions[-1], goal) + noise * torch.randn(count, 2, generator=generator)
        random = 2 * torch.rand(count, 2, generator=generator) - 1
        skilled = torch.rand(count, 1, generator=generator) < skill
        actions.append(torch.where(skilled, steered.clamp(-1, 1), random))
        positions.append(world.move(positions[-1], actions[-1]))
    position, arrived = torch.stack(positions[:-1], 1), torch.stack(positions[1:], 1)
    shape = (count, EPISODE_LENGTH)
    last = torch.zeros(*shape, 1, dtype=torch.bool)
    last[:, -1] = True
    data = TensorDict(
        {
            "observation": world.observe(position),
            "action": torch.stack(actions, 1),
            "next": {
                "observation": world.observe(arrived),
                "physics": torch.cat([arrived, position], -1).double(),
                "reward": torch.zeros(*shape, 1),
                "terminated": torch.zeros_like(last),
                "truncated": last,
                "done": last,
            },
            "episode": torch.arange(count)[:, None].expand(shape),
            "source": torch.arange(len(GOALS)).repeat_interleave(episodes)[:, None].expand(shape),
        },
        batch_size=shape,
    )
    settings = {"episodes": episodes, "noise": noise, "frequency": frequency, "world_seed": world_seed, "seed": seed}
    return TransitionDataset(data.flatten(), {"domain": "swirl", "sources": list(GOALS), **settings})
