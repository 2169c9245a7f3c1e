"""Experience of online agents: rings that survive a kill at any instant, at the price of what is new.

Dimensions: R places of a ring, N environments, n steps of a return, S pictures of an observation.
"""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tensordict import MemoryMappedTensor, TensorDict, TensorDictBase
from torch import Tensor

from components.files import reserve
from components.wording import size

STORAGES = ("memory", "memmap")
_NUMBER = "step"
_CHUNK = 4096  # rows copied at once: bounds the memory for it
_SHORTEST = 32  # steps of an episode: with shorter ones on average, frames for fewer steps than `capacity` are kept
_MAX_DRAWS = 1000


class Ring:
    """The last R of a growing sequence of rows, as memory-mapped files or in memory.

    Rows have numbers, from 0 on; row k lies at place k % R. What was committed can be restored while less than R minus
    the rows that were shown have been written since.

    Args:
        example: a row [...], with its types and shapes.
        length: R.
        folder: where the files lie.
        in_memory: keep rows on `device`, and write them to the files on `commit`; otherwise they are used from there.
        device: of rows in memory.
    """

    def __init__(
        self, example: TensorDictBase, length: int, folder: Path, in_memory: bool, device: torch.device
    ) -> None:
        self.length, self.folder, self.in_memory = length, folder, in_memory
        self.device = device if in_memory else torch.device("cpu")
        self.written = 0
        self.committed = 0
        self.data: TensorDictBase | None = None
        self._layout = example.detach().cpu().expand(length, *example.batch_size)
        self._files: TensorDict | None = None
        self._numbers: Tensor | None = None

    def _create_files(self) -> None:
        marks = TensorDict({_NUMBER: torch.zeros(self.length, dtype=torch.int64)}, batch_size=[self.length])
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_files()  # of a run that starts over: a link among them would be written to
        self._files = self._layout.memmap_like(self.folder / "steps")
        self._numbers = marks.memmap_like(self.folder / "numbers")[_NUMBER]
        try:
            reserve(self.folder)
        except Exception:
            self._delete_files()
            with suppress(OSError):  # it holds something else
                self.folder.rmdir()
            raise
        self._numbers.fill_(-1)

    def _delete_files(self) -> None:
        for part in ("steps", "numbers"):
            _delete_files(self.folder / part)

    def _make_room(self) -> None:
        self.data = self._files
        if self.in_memory:
            self.data = TensorDict(
                {key: torch.zeros_like(value, device=self.device) for key, value in self._layout.items(True, True)},
                batch_size=self._layout.batch_size,
                device=self.device,
            )

    @property
    def bytes(self) -> int:
        """What all R rows take."""
        return sum(value.numel() * value.element_size() for value in self._layout.values(True, True))

    def append(self, rows: TensorDictBase) -> None:
        """Write rows [K, ...] behind those that are there."""
        if self.data is None:
            if not self.in_memory:
                self._create_files()
            self._make_room()
        count = len(rows)
        numbers = torch.arange(self.written, self.written + count)
        places = numbers % self.length
        self.data[places] = rows
        if not self.in_memory:
            self._numbers[places] = numbers
        self.written += count

    def amend(self, key: tuple[str, ...], value: Tensor) -> None:
        """Change an entry of the newest row, in the files too."""
        for data in (self.data, self._files) if self._files is not None else (self.data,):
            data[key][(self.written - 1) % self.length] = value.to(data.device or "cpu")

    def commit(self) -> int:
        """Make everything written so far outlast this process; returns the bytes that had to be written.

        Memory-mapped rows are in the system's hands as soon as they are written, which outlasts a kill of the process.
        """
        if self.data is None:
            return 0
        written = 0
        if self._files is None:
            self._create_files()
        if self.in_memory:
            numbers = torch.arange(max(self.committed, self.written - self.length), self.written)
            for part in (numbers % self.length).split(_CHUNK):
                new = self.data[part.to(self.device)].cpu()
                self._files[part] = new
                written += sum(value.numel() * value.element_size() for value in new.values(True, True))
            self._numbers[numbers % self.length] = numbers
        self.committed = self.written
        return written

    def open_files(self) -> None:
        """Look at what was committed.

        Raises:
            FileNotFoundError: there are no files.
            ValueError: they are damaged, or hold rows of another shape or type.
        """
        marks = TensorDict({_NUMBER: torch.zeros(self.length, dtype=torch.int64)}, batch_size=[self.length])
        self._files = _open_memmap(self.folder / "steps", self._layout)
        self._numbers = _open_memmap(self.folder / "numbers", marks)[_NUMBER]
        reserve(self.folder)  # a copy may have less room than its original had
        self._make_room()

    def restore(self, first: int, written: int) -> None:
        """Show the rows from number `first` to before `written` as they were committed.

        Raises:
            ValueError: some were overwritten.
        """
        if not 0 <= first <= written <= first + self.length:
            raise ValueError(f"{self.folder}: expected at most {self.length} steps, found {first} to {written}.")
        window = torch.arange(first, written)
        if not torch.equal(self._numbers[window % self.length], window):
            raise ValueError(
                f"{self.folder}: expected the last {len(window)} of {written} steps, found some overwritten; "
                "checkpoints must not be further apart than checkpoint_every."
            )
        if self.in_memory:
            for part in (window % self.length).split(_CHUNK):
                self.data[part.to(self.device)] = self._files[part].to(self.device)
        self.written = self.committed = written


def _check_memory(needed: int) -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            "datamodule.replay_capacity, with room for the steps of checkpoint_every: expected at most the "
            f"{size(there)} of memory, found {size(needed)}; datamodule.replay_storage=memmap keeps them on the disk."
        )


class ReplayBuffer:
    """The last `capacity` transitions of N environments stepped together, as memory-mapped files or in memory.

    There is room for `margin` more steps than are shown. Steps that are written after a checkpoint therefore fall on
    places that the checkpoint does not show: a run that goes on from it finds its window untouched, and a checkpoint
    (`commit`) has nothing to write but what is new since the last (in memory) or nothing at all (memory-mapped).

    Observations that are stacks of pictures are kept as the numbers of their pictures, each of which is stored once.
    They are put together again when they are sampled. Where episodes last less than 32 steps on average, their many
    first pictures take the place of the oldest transitions.

    Args:
        example: one step [N] of what is to be stored, with its types and shapes.
        capacity: transitions to sample from.
        margin: steps (of N transitions) that may be written between two checkpoints.
        folder: where the files lie.
        storage: ``memmap`` samples from the files, ``memory`` from tensors on `device`, which `commit` saves.
        device: of the tensors in memory.
        frame_stack: S, if observations [S C, H, W] are pictures, the oldest first, and copies of one when an episode
            begins.

    Raises:
        ValueError: the capacity is not enough for one step or too much for the memory, or the storage is unknown.
    """

    def __init__(
        self,
        example: TensorDictBase,
        capacity: int,
        margin: int,
        folder: str | Path,
        storage: str = "memory",
        device: torch.device | str = "cpu",
        frame_stack: int | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"Unknown storage={storage!r}: expected one of {', '.join(STORAGES)}.")
        self.num_envs = n = example.batch_size[0]
        if capacity < n:
            raise ValueError(f"datamodule.replay_capacity={capacity}: expected at least {n}, one for each environment.")
        self.capacity_steps = capacity // n
        in_memory = storage == "memory"
        self.device = torch.device(device if in_memory else "cpu")
        self.frame_stack = frame_stack
        self._frames: Ring | None = None
        if frame_stack is not None:
            example = example.clone(recurse=False)
            channels = example["observation"].shape[1] // frame_stack
            frame = TensorDict({"frame": example["observation"][0, -channels:]}, batch_size=[])
            numbers = torch.zeros(n, frame_stack, dtype=torch.int64)
            example["frames"] = example["next", "frames"] = numbers
            example = example.exclude("observation", ("next", "observation"))
            # Every step after a checkpoint might begin an episode.
            self._frame_margin = 2 * margin * n
            shown = math.ceil(self.capacity_steps * n * (1 + 1 / _SHORTEST)) + frame_stack * n
            self._frames = Ring(frame, shown + self._frame_margin, Path(folder) / "frames", in_memory, self.device)
        self._steps = Ring(example, self.capacity_steps + margin, Path(folder), in_memory, self.device)
        if in_memory and self.device.type == "cpu":
            _check_memory(self._steps.bytes + (0 if self._frames is None else self._frames.bytes))
        self._keys = list(example.keys(True, True))
        self._rows: dict[tuple[str, ...], Tensor] = {}  # all transitions one after the other
        self._oldest = 0
        # What is looked at while steps are written or chosen; never on a GPU.
        self._terminated = torch.zeros(self._steps.length, n, dtype=torch.bool)
        self._truncated = torch.zeros(self._steps.length, n, dtype=torch.bool)
        self._first_frame = torch.zeros(self._steps.length, dtype=torch.int64)  # the oldest that a step refers to
        self._newest = torch.zeros(n, frame_stack or 0, dtype=torch.int64)  # frames of where the environments are

    @property
    def written(self) -> int:
        """Steps written so far."""
        return self._steps.written

    @property
    def size(self) -> int:
        """Steps that can be sampled from."""
        return self.written - self._oldest

    # -- writing ------------------------------------------------------------------------------------------------------

    def extend(self, batch: TensorDictBase) -> None:
        """Append steps [N, T] as a collector gives them."""
        for step in batch.unbind(1):
            place = self.written % self._steps.length
            if self._frames is not None:
                step = self._with_frame_numbers(step, place)
            self._steps.append(step.select(*self._keys)[None])
            self._terminated[place] = step["next", "terminated"][:, 0]
            self._truncated[place] = step["next", "truncated"][:, 0]
            self._forget()
        self._view_rows()

    def _with_frame_numbers(self, step: TensorDictBase, place: int) -> TensorDictBase:
        """Store the new pictures of a step [N], and have it refer to them."""
        channels = step["observation"].shape[1] // self.frame_stack
        before = (self.written - 1) % self._steps.length
        began = self._terminated[before] | self._truncated[before] | (self.written == 0)
        numbers = self._newest.clone()
        if began.any():
            stacks = step["observation"][began]
            assert (stacks.unflatten(1, (self.frame_stack, channels)) == stacks[:, None, -channels:]).all()
            numbers[began] = self._store(stacks[:, -channels:])
        following = torch.cat([numbers[:, 1:], self._store(step["next", "observation"][:, -channels:])], 1)
        self._first_frame[place], self._newest = numbers.min(), following
        step = step.clone(recurse=False)
        step["frames"], step["next"] = numbers, step["next"].clone(recurse=False).set("frames", following)
        return step

    def _store(self, frames: Tensor) -> Tensor:
        """Append pictures [K, C, H, W] and return their numbers [K, 1]."""
        first = self._frames.written
        self._frames.append(TensorDict({"frame": frames}, batch_size=frames.shape[:1]))
        return torch.arange(first, self._frames.written)[:, None]

    def _forget(self) -> None:
        self._oldest = max(self._oldest, self.written - self.capacity_steps)
        if self._frames is not None:
            kept_from = self._frames.written + self._frame_margin - self._frames.length
            while self.size and self._first_frame[self._oldest % self._steps.length] < kept_from:
                self._oldest += 1

    def _view_rows(self) -> None:
        if not self._rows:
            self._rows = {
                key if isinstance(key, tuple) else (key,): value.flatten(0, 1)
                for key, value in self._steps.data.items(include_nested=True, leaves_only=True)
            }

    def end_episodes(self, rows: Tensor | slice = slice(None)) -> None:
        """Mark the newest step as the last of its episodes in these rows: what is written next begins new ones."""
        place = (self.written - 1) % self._steps.length
        self._truncated[place, rows] = ~self._terminated[place, rows]
        self._steps.amend(("next", "truncated"), self._truncated[place][:, None])

    def commit(self) -> int:
        """Make everything written so far outlast this process; returns the bytes that had to be written."""
        return (0 if self._frames is None else self._frames.commit()) + self._steps.commit()

    def restore(self, written: int) -> None:
        """Show what was there when so many steps had been written.

        Raises:
            FileNotFoundError: there are no files.
            ValueError: they hold other steps, or steps of another shape.
        """
        if written == 0:
            return
        self._steps.open_files()
        self._oldest = max(0, written - self.capacity_steps)
        self._steps.restore(self._oldest, written)
        places = torch.arange(self._oldest, written) % self._steps.length
        for part in places.split(_CHUNK):
            rows = self._steps.data[part.to(self.device)].cpu()
            self._terminated[part] = rows["next", "terminated"][..., 0]
            self._truncated[part] = rows["next", "truncated"][..., 0]
            if self._frames is not None:
                self._first_frame[part] = rows["frames"].flatten(1).min(1).values
        if self._frames is not None:
            self._newest = rows["next", "frames"][-1]
            self._frames.open_files()
            self._frames.written = int(self._newest.max()) + 1
            self._forget()
            self._frames.restore(int(self._first_frame[self._oldest % self._steps.length]), self._frames.written)
        self._view_rows()

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sample(
        self, shape: tuple[int, ...], generator: torch.Generator, n_step: int = 1, discount: float = 1.0
    ) -> TensorDict:
        """Transitions [*shape], uniformly with replacement.

        With n > 1 the reward is the sum of discount^k r_{t+k} over the n steps or up to a termination, whichever comes
        first, `("next", ...)` is what that last step led to, and `steps_to_next_obs` [*shape, 1] says how many steps
        there were. Starts whose n steps reach beyond the end of their episode by truncation, or beyond what is
        collected yet, are left out.

        Raises:
            ValueError: there is no start with n steps.
        """
        start = self._draw(math.prod(shape), generator, n_step).view(shape)
        if self.device.type == "cuda":
            start = start.pin_memory().to(self.device, non_blocking=True)
        count = self._steps.length * self.num_envs
        if n_step == 1:
            return self._transitions(start, start)
        going = torch.ones(*shape, 1, dtype=torch.bool, device=self.device)
        reward, steps = torch.zeros(*shape, 1, device=self.device), torch.zeros(*shape, 1, device=self.device)
        last = start
        for k in range(n_step):
            place = (start + k * self.num_envs) % count
            last = torch.where(going[..., 0], place, last)
            reward = reward + discount**k * going * self._rows["next", "reward"][place]
            steps = steps + going
            going = going & ~self._rows["next", "terminated"][place]
        batch = self._transitions(start, last)
        batch["next", "reward"] = reward
        batch["steps_to_next_obs"] = steps
        return batch

    def _draw(self, count: int, generator: torch.Generator, n_step: int) -> Tensor:
        """Places [count] in the ring, counted in transitions, where a return of n steps begins."""
        starts = (self.size - n_step + 1) * self.num_envs
        problem = f"n_step={n_step}: expected as many steps of an episode in the replay data, found "
        if starts < 1:
            raise ValueError(f"{problem}{self.size}.")
        # Transitions lie in the ring in the order in which they were written: N of each step.
        first, places = self._oldest * self.num_envs, self._steps.length * self.num_envs
        terminated, truncated = self._terminated.flatten(), self._truncated.flatten()
        chosen: list[Tensor] = []
        for _ in range(_MAX_DRAWS):
            drawn = (torch.randint(starts, (count,), generator=generator) + first) % places
            if n_step == 1:
                return drawn
            whole, going = torch.ones_like(drawn, dtype=torch.bool), torch.ones_like(drawn, dtype=torch.bool)
            for k in range(n_step - 1):
                place = (drawn + k * self.num_envs) % places
                whole &= ~(going & truncated[place])
                going &= ~(terminated[place] | truncated[place])
            chosen.append(drawn[whole])
            count -= len(chosen[-1])
            if not count:
                return torch.cat(chosen)
        raise ValueError(f"{problem}shorter episodes.")

    def _transitions(self, start: Tensor, last: Tensor) -> TensorDict:
        """What began at these places and ended at those, counted in transitions: [*start.shape]."""
        shape = start.shape
        start, last = start.flatten(), last.flatten()
        rows: dict[str, Any] = {}
        for (*parents, name), values in self._rows.items():
            row = values.index_select(0, last if "next" in parents else start)
            if name == "frames":
                name = "observation"
                row = self._frames.data["frame"].index_select(0, row.flatten() % self._frames.length)
                row = row.view(len(start), -1, *row.shape[2:])
            entries = rows
            for parent in parents:  # nested dictionaries are put together in half the time that keys of tuples take
                entries = entries.setdefault(parent, {})
            entries[name] = row if len(shape) == 1 else row.view(*shape, *row.shape[1:])
        return TensorDict(rows, batch_size=shape, device=self.device)


def delete_replay_files(folder: str | Path) -> None:
    """Delete what the replay buffers of all processes wrote to a folder, but nothing else that lies there."""
    for process in Path(folder).glob("process_[0-9]*"):
        _delete_files(process)
    with suppress(OSError):  # it holds something else
        Path(folder).rmdir()


def _delete_files(folder: Path) -> None:
    """Delete mapped tensors, their descriptions, links, and the folders that are empty then."""
    inside = [] if folder.is_symlink() else sorted(folder.rglob("*"), reverse=True)  # the innermost first
    for path in (*inside, folder):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it holds something else
                path.rmdir()
        elif path.is_symlink() or path.suffix == ".memmap" or path.name == "meta.json":
            path.unlink()


def _open_memmap(folder: Path, layout: TensorDictBase) -> TensorDict:
    """The files that `layout.memmap_like(folder)` made, mapped.

    Unlike `TensorDict.load_memmap`, which makes whatever the folder describes and unpickles what lies there for it,
    nothing is opened but the files of the layout, and no link is followed: what is mapped is written to.

    Raises:
        FileNotFoundError: there are no files.
        ValueError: they are damaged, or hold tensors of another shape or type.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected the replay data of the checkpoint, found none.")
    mapped = TensorDict(batch_size=layout.batch_size)
    for key, value in layout.items(True, True):
        *parents, name = (key,) if isinstance(key, str) else key
        file = folder.joinpath(*parents, f"{name}.memmap")
        for path in (folder, *(folder.joinpath(*parents[: depth + 1]) for depth in range(len(parents))), file):
            if path.is_symlink():
                raise ValueError(f"{path}: expected replay data, found a link.")
        found, expected = _description(file.with_name("meta.json"), name), (list(value.shape), str(value.dtype))
        if found != expected:
            raise ValueError(f"{file}: expected {expected[1]} {expected[0]}, found {found[1]} {found[0]}.")
        size = file.stat().st_size if file.is_file() else 0
        if size != value.nbytes:  # mapping a file that was cut short would fill it up with zeros
            raise ValueError(f"{file}: expected {value.nbytes} bytes of replay data, found {size}.")
        mapped[key] = MemoryMappedTensor.from_filename(file, value.dtype, value.shape)
    return mapped


def _description(path: Path, name: str) -> tuple[list[int], str]:
    """Shape and type of a tensor, as the file beside it says."""
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise FileNotFoundError
        entry = json.loads(path.read_text())[name]
        return entry["shape"], entry["dtype"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: expected a description of {name}, found none that is whole.") from None
