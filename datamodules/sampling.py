"""Loaders: batches drawn by a rule that needs no state to resume, and tasks to evaluate on."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from components.distributed import rank
from components.priority_tree import PriorityTree


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
        futures: draws what followed, if that is asked for.
    """

    data: TensorDict
    batch_size: int
    updates_per_step: int
    start: int
    stop: int
    seed: int
    futures: "Futures | None" = None

    def __len__(self) -> int:
        return max(0, self.stop - self.start) // self.updates_per_step

    def __iter__(self) -> Iterator[TensorDict]:
        shape = (self.updates_per_step, self.batch_size)
        for update in range(self.start, self.stop, self.updates_per_step):
            generator = batch_generator(self.seed, update)
            index = torch.randint(self.data.batch_size[0], shape, generator=generator)
            index = _sent(index, self.data.device)
            batch = self.data[index]
            if self.futures is not None:
                batch["next", "future"] = self.futures.draw(index, generator)
            yield batch


@dataclass
class Futures:
    """Draws states that follow transitions in their episodes.

    Attributes:
        next_observation: of all transitions, [n, O].
        last: the last transition of each one's episode, int64 [n].
        states, discount, delay: see `LearningMethod.futures`.
    """

    next_observation: Tensor
    last: Tensor
    states: int
    discount: float
    delay: int = 0

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Next observations [..., K, O] of transitions that are not before those of `index` [...]."""
        chance = torch.rand(*index.shape, self.states, generator=generator, dtype=torch.float64)
        later = (torch.log1p(-chance) / math.log(max(self.discount, 1e-300))).long()  # geometric, from 0 on
        if self.delay:
            share = torch.rand(*index.shape, 1, generator=generator, dtype=torch.float64)
            later = later + (share * math.log(self.delay + 2)).exp().long() - 1
        last = self.last[index].unsqueeze(-1)
        return self.next_observation[torch.minimum(index.unsqueeze(-1) + _sent(later, index.device), last)]


@dataclass
class PrioritisedDraws:
    """Draws a batch with the priorities that there are by then, as a function of (seed, rank, update) and those.

    Draws are stratified: of B rows, the j-th lies in the j-th of B parts of equal probability.

    Attributes:
        tree: of as many rows as the data, on their device.
        prioritised: ``batch`` or ``beside``, see `LearningMethod`.
        refresh: called before each draw.
        data: transitions [n].
        device: where batches are wanted.
        batch_size: transitions of this process in one update.
        seed: of the run.
    """

    tree: PriorityTree
    prioritised: str
    refresh: Callable[[], None]
    data: TensorDict
    device: torch.device | str
    batch_size: int
    seed: int

    def stack(self, count: int, update: int) -> "DrawnInTurn":
        """The batches of so many updates, each drawn when its turn comes."""
        return DrawnInTurn(self, update, count)

    def __call__(self, update: int) -> TensorDict:
        self.refresh()
        generator, size = batch_generator(self.seed, update), self.batch_size
        offset = torch.rand(size, generator=generator, dtype=torch.float64)
        share = (torch.arange(size, dtype=torch.float64) + offset) / size
        index, log_probability = self.tree.draw(_sent(share, self.data.device))
        drawn = self.data[index]
        drawn["index"], drawn["log_probability"] = index, log_probability.float().unsqueeze(-1)
        if self.prioritised == "batch":
            return drawn.to(self.device)
        uniform = _sent(torch.randint(self.data.batch_size[0], (size,), generator=generator), self.data.device)
        batch = self.data[uniform]
        batch["index"], batch["prioritised"] = uniform, drawn
        return batch.to(self.device)


@dataclass
class DrawnInTurn:
    """A stack of batches of which each is drawn when it is asked for: the updates before it change what is drawn."""

    draw: Callable[[int], TensorDict]
    first: int
    count: int

    @property
    def shape(self) -> tuple[int]:
        return (self.count,)

    def unbind(self, dim: int) -> Iterator[TensorDict]:
        """The batches one after the other; the first dimension is the only one."""
        return map(self.draw, range(self.first, self.first + self.count))


def _sent(drawn: Tensor, device: torch.device | None) -> Tensor:
    """To where the data are, without waiting for it."""
    if device is not None and device.type == "cuda":
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn


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
