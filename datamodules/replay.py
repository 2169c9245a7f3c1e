"""Experience of online agents: a ring of steps that survives a kill at any instant, at the price of what is new.

Dimensions: R steps in the ring, N environments, n steps of a return.
"""

from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

STORAGES = ("memory", "memmap")
_STEP = "step"


class ReplayBuffer:
    """The last `capacity` transitions of N environments stepped together, as memory-mapped files or in memory.

    The ring has room for `margin` more steps than it shows. Steps that are written after a checkpoint therefore fall on
    places that the checkpoint does not show: a run that goes on from it finds its window untouched, and a checkpoint
    (`commit`) has nothing to write but what is new since the last (in memory) or nothing at all (memory-mapped).

    Args:
        example: one step [N] of what is to be stored, with its types and shapes.
        capacity: transitions to sample from.
        margin: steps (of N transitions) that may be written between two checkpoints.
        folder: where the files lie.
        storage: ``memmap`` samples from the files, ``memory`` from tensors on `device`, which `commit` saves.
        device: of the tensors in memory.

    Raises:
        ValueError: the capacity is not enough for one step, or the storage is unknown.
    """

    def __init__(
        self,
        example: TensorDictBase,
        capacity: int,
        margin: int,
        folder: str | Path,
        storage: str = "memory",
        device: torch.device | str = "cpu",
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"Unknown storage={storage!r}: expected one of {', '.join(STORAGES)}.")
        self.num_envs = example.batch_size[0]
        if capacity < self.num_envs:
            raise ValueError(f"capacity={capacity}: expected at least one transition for each of {self.num_envs} rows.")
        self.steps = capacity // self.num_envs
        self.ring = self.steps + margin
        self.folder = Path(folder)
        self.in_memory = storage == "memory"
        self.device = torch.device(device if self.in_memory else "cpu")
        self.written = 0
        self.committed = 0
        self._layout = example.detach().cpu().expand(self.ring, self.num_envs)
        self._files: TensorDict | None = None
        self._numbers: Tensor | None = None
        self._data: TensorDictBase | None = None
        self._rows: dict[tuple[str, ...], Tensor] = {}  # views of the same, all transitions one after the other

    @property
    def size(self) -> int:
        """Steps that can be sampled from."""
        return min(self.written, self.steps)

    def _open(self, create: bool) -> None:
        marks = TensorDict({_STEP: torch.full((self.ring,), -1)}, batch_size=[self.ring])
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files = self._layout.memmap_like(self.folder / "steps")
            self._numbers = marks.memmap(self.folder / "numbers")[_STEP]
        else:
            self._files = TensorDict.load_memmap(self.folder / "steps")
            self._numbers = TensorDict.load_memmap(self.folder / "numbers")[_STEP]
        self._data = self._files
        if self.in_memory:
            self._data = TensorDict(
                {key: torch.zeros_like(value, device=self.device) for key, value in self._layout.items(True, True)},
                batch_size=self._layout.batch_size,
                device=self.device,
            )
        self._rows = {
            key if isinstance(key, tuple) else (key,): value.flatten(0, 1)
            for key, value in self._data.items(include_nested=True, leaves_only=True)
        }

    def extend(self, batch: TensorDictBase) -> None:
        """Append steps [N, T] as a collector gives them."""
        if self._data is None:
            self._open(create=True)
        for step in range(batch.batch_size[1]):
            place = self.written % self.ring
            self._data[place] = batch[:, step].select(*self._layout.keys(True, True))
            if not self.in_memory:
                self._numbers[place] = self.written
            self.written += 1

    def end_episodes(self) -> None:
        """Mark the newest step as the last of its episodes: what is written next begins new ones."""
        place = (self.written - 1) % self.ring
        for data in (self._data, self._files):
            data["next", "truncated"][place] = ~data["next", "terminated"][place]

    def commit(self) -> int:
        """Make everything written so far outlast this process; returns the bytes that had to be written.

        Memory-mapped steps are in the system's hands as soon as they are written, which outlasts a kill of the process.
        """
        if self._data is None:
            return 0
        written = 0
        if self.in_memory:
            first = max(self.committed, self.written - self.ring)
            places = torch.arange(first, self.written) % self.ring
            for part in places.split(4096):
                new = self._data[part.to(self.device)].cpu()
                self._files[part] = new
                written += sum(value.numel() * value.element_size() for value in new.values(True, True))
            self._numbers[places] = torch.arange(first, self.written)
        self.committed = self.written
        return written

    def restore(self, written: int) -> None:
        """Show what was there when so many steps had been written.

        Raises:
            FileNotFoundError: there are no files.
            ValueError: they hold other steps, or steps of another shape.
        """
        if written == 0:
            return
        if not (self.folder / "steps").is_dir():
            raise FileNotFoundError(f"{self.folder}: expected the replay data of the checkpoint, found none.")
        self._open(create=False)
        found = {str(key): (value.shape, value.dtype) for key, value in self._files.items(True, True)}
        expected = {str(key): (value.shape, value.dtype) for key, value in self._layout.items(True, True)}
        for key in [*expected, *found]:
            if found.get(key) != expected.get(key):
                raise ValueError(
                    f"{self.folder}: expected {key} to be {_text(expected.get(key))}, found {_text(found.get(key))}."
                )
        window = torch.arange(max(0, written - self.steps), written)
        if not torch.equal(self._numbers[window % self.ring], window):
            raise ValueError(
                f"{self.folder}: expected the last {len(window)} of {written} steps, found some overwritten; "
                "checkpoints must not be further apart than checkpoint_every."
            )
        if self.in_memory:
            for part in (window % self.ring).split(4096):
                self._data[part.to(self.device)] = self._files[part].to(self.device)
        self.written = self.committed = written

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, n_step: int = 1, discount: float = 1.0):
        """Transitions [*shape], uniformly with replacement.

        With n > 1 the reward is the sum of discount^k r_{t+k} over the n steps or up to the end of the episode,
        whichever comes first, `("next", ...)` is what that last step led to, and `steps_to_next_obs` [*shape, 1] says
        how many steps there were. Starts whose n steps are not all collected yet are left out.

        Raises:
            ValueError: fewer than n steps are there.
        """
        starts = self.size - n_step + 1
        if starts < 1:
            raise ValueError(f"n_step={n_step}: expected as many steps in the replay data, found {self.size}.")
        flat = torch.randint(starts * self.num_envs, shape, generator=generator)
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        # Transitions lie in the ring in the order in which they were written: N of each step.
        first = (self.written - self.size) * self.num_envs
        start, count = flat + first, self.ring * self.num_envs
        if n_step == 1:
            return self._transitions(start % count)
        going = torch.ones(*shape, 1, dtype=torch.bool, device=self.device)
        reward, steps = torch.zeros(*shape, 1, device=self.device), torch.zeros(*shape, 1, device=self.device)
        last = start
        for k in range(n_step):
            place = (start + k * self.num_envs) % count
            last = torch.where(going[..., 0], place, last)
            reward = reward + discount**k * going * self._rows["next", "reward"][place]
            steps = steps + going
            going = going & ~(self._rows["next", "terminated"][place] | self._rows["next", "truncated"][place])
        batch = self._transitions(start % count)
        batch["next"] = self._transitions(last)["next"]
        batch["next", "reward"] = reward
        batch["steps_to_next_obs"] = steps
        return batch

    def _transitions(self, place: Tensor) -> TensorDict:
        """Those at these places of the ring, counted in transitions: [*place.shape]."""
        flat = place.flatten()
        rows = {key: values.index_select(0, flat).unflatten(0, place.shape) for key, values in self._rows.items()}
        return TensorDict(rows, batch_size=place.shape, device=self.device)


def _text(layout: tuple[torch.Size, torch.dtype] | None) -> str:
    return "nothing" if layout is None else f"{list(layout[0])} of {str(layout[1]).removeprefix('torch.')}"
