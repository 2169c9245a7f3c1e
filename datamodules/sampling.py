"""Loaders: batches drawn by a rule that needs no state to resume, and tasks to evaluate on."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

from components.distributed import rank


def batch_generator(seed: int, update: int) -> torch.Generator:
    """The source of chance of one update's batch: a function of (seed, rank, update)."""
    digest = hashlib.blake2b(f"{seed}/{rank()}/{update}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


@dataclass
class Stacks:
    """Yields what `draw` makes of every `updates_per_step`-th update, start <= u < stop: stacks of batches."""

    draw: Callable[[int], TensorDict]
    updates_per_step: int
    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start) // self.updates_per_step

    def __iter__(self) -> Iterator[TensorDict]:
        return map(self.draw, range(self.start, self.stop, self.updates_per_step))


@dataclass
class UniformBatches:
    """Yields stacks of batches, [updates_per_step, batch_size] transitions drawn uniformly with replacement.

    The indices of update u are a function of (seed, rank, u) and the shape of the stack alone: a run that resumes at an
    update sees the very batches that the uninterrupted run would have seen, and every process of a parallel run has a
    stream of its own.

    Attributes:
        data: transitions [n], on any device.
        batch_size: transitions of this process in one update.
        updates_per_step: batches in a stack.
        start, stop: the updates to yield batches for, start <= u < stop.
        seed: of the run.
    """

    data: TensorDict
    batch_size: int
    updates_per_step: int
    start: int
    stop: int
    seed: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start) // self.updates_per_step

    def __iter__(self) -> Iterator[TensorDict]:
        count, device = self.data.batch_size[0], self.data.device
        shape = (self.updates_per_step, self.batch_size)
        for update in range(self.start, self.stop, self.updates_per_step):
            generator = batch_generator(self.seed, update)
            index = torch.randint(count, shape, generator=generator)
            if device is not None and device.type == "cuda":
                index = index.pin_memory().to(device, non_blocking=True)
            yield self.data[index]


class EvaluationTasks:
    """A loader of evaluation tasks, each a batch of its own."""

    def __init__(self, tasks: Sequence[Any]) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)


class FixedTasks:
    """For datamodules that can be evaluated in one way only."""

    def choose_tasks(self, protocol: str | None = None, reward: str | None = None) -> None:
        """Refuse another way.

        Raises:
            ValueError: it is asked for.
        """
        for name, value in (("protocol", protocol), ("reward", reward)):
            if value is not None:
                raise ValueError(f"{name}={value}: expected an experiment with an environment, found one without.")
