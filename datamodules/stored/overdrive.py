"""Data of the point that is slowed by pushing too hard: random actions, from a part of their range or all of it."""

import math

import torch
from tensordict import TensorDict
from torch import Tensor

from components.buildable import buildable
from components.checks import Seed, Size, checked
from datamodules.environments.overdrive import EPISODE_LENGTH, TURN_OVER, move
from datamodules.stored.transitions import TransitionDataset


@buildable()
@checked
def overdrive_dataset(coverage: str, episodes: Size = 1000, seed: Seed = 0) -> TransitionDataset:
    """Episodes of random actions, uniform in the disc |a| <= 0.5 (`narrow`) or in the square (`full`).

    Raises:
        ValueError: `coverage` is neither.
    """
    if coverage not in ("narrow", "full"):
        raise ValueError(f"Unknown coverage={coverage!r}: expected narrow or full.")
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    shape = (episodes, EPISODE_LENGTH)
    if coverage == "full":
        action = 2 * uniform(*shape, 2) - 1
    else:
        radius, angle = TURN_OVER * uniform(*shape, 1).sqrt(), 2 * math.pi * uniform(*shape, 1)
        action = radius * torch.cat([angle.cos(), angle.sin()], -1)
    positions = [2 * uniform(episodes, 2) - 1]
    for step in range(EPISODE_LENGTH):
        positions.append(move(positions[-1], action[:, step]))
    observation, arrived = torch.stack(positions[:-1], 1), torch.stack(positions[1:], 1)
    last = torch.zeros(*shape, 1, dtype=torch.bool)
    last[:, -1] = True
    data = TensorDict(
        {
            "observation": observation,
            "action": action,
            "next": {
                "observation": arrived,
                "physics": arrived.double(),
                "reward": torch.zeros(*shape, 1),
                "terminated": torch.zeros_like(last),
                "truncated": last,
                "done": last,
            },
            "episode": torch.arange(episodes)[:, None].expand(shape),
            "source": torch.zeros(shape, dtype=torch.int64),
        },
        batch_size=shape,
    )
    return TransitionDataset(
        data.flatten(), {"domain": "overdrive", "coverage": coverage, "episodes": episodes, "seed": seed}
    )
