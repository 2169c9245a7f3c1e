"""Images of one group of classes after another, and exemplars of those that came before.

Dimensions: n images, B batch, P pairs, C channels, H height and width, T tasks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import Count, CountOrZero, Seed, Size, SizeOrZero, checked
from components.coding.class_incremental import average_incremental_accuracy, forgetting, herding
from components.coding.exemplars import ExemplarMemory, ImageStore, RawStore
from components.coding.image_codec import STREAMS, ImageCodec
from components.distributed import rank, world_size
from components.structure import COUNT
from datamodules.images.readers import LabelledImages
from datamodules.sampling import EvaluationTasks, FixedTasks, Stacks, batch_generator

VIEWS = ("raw", "reconstructed", "both")
SELECTIONS = ("random", "herding")


@checked
class ImageDataModule(FixedTasks, L.LightningDataModule):
    """Images whose classes are put in an order, a group of them first and then one small group after the other.

    Args:
        dataset: makes the images.
        base_classes: in the first group.
        classes_per_task: in each of the others.
        classes: that are used in all, the first of their order; None for all.
        per_class: training images of each class at most; None for all.
        test_per_class: the same for tests.
        order_seed: of the order of classes, a permutation by NumPy's legacy generator, as published protocols have it;
            None for the order of the labels.
        batch_size: images in an update, over all processes.
        updates_per_step: updates in one Lightning step.
        seed: of what is drawn.
    """

    evaluation_seed = 12345

    def __init__(
        self,
        dataset: Callable[[], LabelledImages],
        *,
        base_classes: Size,
        classes_per_task: Size,
        batch_size: Size,
        updates_per_step: Size = 1,
        classes: Size | None = None,
        per_class: Count | None = None,
        test_per_class: Count | None = None,
        order_seed: Seed | None = 1993,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self._make_dataset = dataset
        self.base_classes = base_classes
        self.classes_per_task = classes_per_task
        self.most_classes = classes
        self.per_class = per_class
        self.test_per_class = test_per_class
        self.order_seed = order_seed
        self.batch_size = batch_size
        self.updates_per_step = updates_per_step
        self.seed = seed

    @cached_property
    def data(self) -> LabelledImages:
        """The images that are used, labels in the order in which their classes come."""
        every = self._make_dataset()
        there = int(every.labels.max()) + 1
        count = there if self.most_classes is None else self.most_classes
        if count > there:
            raise ValueError(f"classes={count}: expected at most the data's {there}.")
        if (count - self.base_classes) % self.classes_per_task or count < self.base_classes:
            raise ValueError(
                f"base_classes={self.base_classes}, classes_per_task={self.classes_per_task}: expected to make up the "
                f"{count} classes."
            )
        order = np.arange(there)
        if self.order_seed is not None:
            order = np.random.RandomState(self.order_seed).permutation(there)
        places = torch.from_numpy(np.argsort(order))
        labels, test_labels = places[every.labels], places[every.test_labels]
        chosen = self._some(labels, count, self.per_class)
        chosen_tests = self._some(test_labels, count, self.test_per_class)
        return LabelledImages(
            every.images[chosen], labels[chosen], every.test_images[chosen_tests], test_labels[chosen_tests]
        )

    def _some(self, labels: Tensor, classes: int, most: int | None) -> Tensor:
        """Which images are used: the first of each class."""
        if most is None:
            return (labels < classes).nonzero()[:, 0]
        return torch.cat([(labels == label).nonzero()[:most, 0] for label in range(classes)])

    @property
    def classes(self) -> int:
        return int(self.data.labels.max()) + 1

    def seen(self, task: int) -> int:
        """Classes that have come by a task."""
        return self.base_classes + task * self.classes_per_task

    @property
    def spec(self) -> dict[str, Any]:
        return {"image_shape": list(self.data.images.shape[1:])}

    def of_classes(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Training images of classes first .. end - 1, and their labels."""
        chosen = (self.data.labels >= first) & (self.data.labels < end)
        return self.data.images[chosen], self.data.labels[chosen]

    def share(self) -> int:
        """The part of a batch that a process draws."""
        if self.batch_size % world_size():
            raise ValueError(f"batch_size={self.batch_size} can't be split over {world_size()} processes.")
        return self.batch_size // world_size()


@checked
class BaseClassImages(ImageDataModule):
    """Batches of the first group's images, to learn a codec by, and tests of it on all groups.

    Args:
        evaluate_every: updates between evaluations.
        settings: of `ImageDataModule`.
    """

    def __init__(self, dataset: Callable[[], LabelledImages], *, evaluate_every: Count, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        if evaluate_every % self.updates_per_step:
            raise ValueError(
                f"evaluate_every={evaluate_every} is no multiple of updates_per_step={self.updates_per_step}."
            )
        self.evaluate_every = evaluate_every

    def train_dataloader(self) -> Stacks:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        images = self.of_classes(0, self.base_classes)[0]
        boundary = module.autoencoder_updates
        if module.updates >= boundary:
            module.begin_codes(images)
        stop = min((module.updates // self.evaluate_every + 1) * self.evaluate_every, module.total_updates)
        if module.updates < boundary:
            stop = min(stop, boundary)
        shape, on_device = (self.updates_per_step, self.share()), images.to(module.device)

        def draw(update: int) -> TensorDict:
            index = torch.randint(len(images), shape, generator=batch_generator(self.seed, update))
            return TensorDict({"image": on_device[index.to(module.device)]}, batch_size=shape)

        return Stacks(draw, self.updates_per_step, module.updates, stop)

    def val_dataloader(self) -> EvaluationTasks:
        return self._tasks(coding=False)

    def test_dataloader(self) -> EvaluationTasks:
        return self._tasks(coding=True)

    def _tasks(self, coding: bool) -> EvaluationTasks:
        codec = self.trainer.lightning_module.codec
        known = self.data.test_labels < self.base_classes
        groups = {"base": known, "new": ~known} if (~known).any() else {"base": known}
        return EvaluationTasks(
            [CodecTask(name, self.data.test_images[rows], codec, coding) for name, rows in groups.items()]
        )


@checked
class ClassIncrementalDataModule(ImageDataModule):
    """One task after another: its images, and what a memory of exemplars makes of those of earlier ones.

    When a task begins, the memory is restored once and the method told (`begin_task`); batches are drawn so that each
    class that is there is equally likely. When it ends, before it is evaluated, exemplars of its classes are put into
    the memory. The memory's files and the number of tasks done travel in the checkpoint.

    Args:
        dataset: makes the images.
        task_updates: updates of each task.
        store: makes what keeps exemplars, called with `image_shape`.
        bytes_per_class: budget of the memory for each class seen; None keeps all images, 0 none.
        memory_folder: where the memory's files are written after each task, for whoever wants them.
        raw_per_class: exemplars of each class that are kept as they are besides, for Information Back and for replay.
        view: how a task's own images are shown: ``raw``, as the memory would restore them (``reconstructed``), or
            ``both``, each as often. Old classes are only ever seen as restored; a classifier that sees new ones only as
            they are learns to tell restored images from others instead of classes.
        selection: of exemplars, ``random`` or by ``herding``.
        pairs: images beside their reconstructions in a batch, for Information Back; 0 for none.
        settings: of `ImageDataModule`.
    """

    writes: ClassVar = ("memory_folder",)
    state_structure: ClassVar = {"finished": COUNT, "fallbacks": COUNT, "memory": Tensor, "raw": Tensor}

    def __init__(
        self,
        dataset: Callable[[], LabelledImages],
        *,
        task_updates: Sequence[Count],
        store: Callable[..., ImageStore],
        bytes_per_class: CountOrZero | None,
        memory_folder: str,
        raw_per_class: CountOrZero = 0,
        view: str = "both",
        selection: str = "random",
        pairs: SizeOrZero = 0,
        **settings: Any,
    ) -> None:
        super().__init__(dataset, **settings)
        if isinstance(task_updates, int):
            raise ValueError(f"task_updates={task_updates}: expected a list of numbers, one for each task.")
        for index, updates in enumerate(task_updates):
            if updates % self.updates_per_step:
                raise ValueError(f"task_updates[{index}]={updates} is no multiple of {self.updates_per_step}.")
        if view not in VIEWS:
            raise ValueError(f"Unknown view={view!r}: expected one of {', '.join(VIEWS)}.")
        if selection not in SELECTIONS:
            raise ValueError(f"Unknown selection={selection!r}: expected one of {', '.join(SELECTIONS)}.")
        tasks = 1 + (self.classes - self.base_classes) // self.classes_per_task
        if len(task_updates) != tasks:
            raise ValueError(f"task_updates={list(task_updates)}: expected {tasks} numbers, one for each task.")
        shape = self.spec["image_shape"]
        self.task_updates = list(task_updates)
        self.view = view
        self.selection = selection
        self.pairs = pairs
        self.memory = ExemplarMemory(store(image_shape=shape), bytes_per_class)
        self.raw = ExemplarMemory(RawStore(shape), raw_per_class * int(np.prod(shape)))
        self.memory_folder = Path(memory_folder)
        self.raw_per_class = raw_per_class
        self.finished = 0  # tasks
        self.fallbacks = 0  # tasks after which the store could not write as it was asked to
        self._current: _Training | None = None

    @property
    def spec(self) -> dict[str, Any]:
        return {**super().spec, "classes": self.classes}

    def task_at(self, update: int) -> int:
        """The task that an update belongs to; the number of tasks after the last."""
        return int(np.searchsorted(np.cumsum(self.task_updates), update, side="right"))

    # -- experience ---------------------------------------------------------------------------------------------------

    def _begin(self, module: Any, task: int) -> "_Training":
        if self._current is not None and self._current.task == task:
            return self._current
        first, seen = self.seen(task - 1) if task else 0, self.seen(task)
        self.memory.store.to(module.device)
        module.begin_task(task, seen)
        new, labels = self.of_classes(first, seen)
        again = self._restored(new)
        old, raw = self.memory.images(), self.raw.images()
        own = {"raw": [(new, labels)], "reconstructed": [(again, labels)], "both": [(new, labels), (again, labels)]}
        images, labels = (torch.cat(parts) for parts in zip(old, raw, *own[self.view]))
        pairs = None
        if self.pairs:
            plain, classes = (torch.cat(parts) for parts in zip(raw, self.of_classes(first, seen)))
            pairs = _Balanced(torch.stack([plain, self._restored(plain)], 1), classes, module.device)
        self._current = _Training(task, _Balanced(images, labels, module.device), pairs)
        return self._current

    def _restored(self, images: Tensor) -> Tensor:
        store = self.memory.store
        return store.restore(store.shrink(images))

    def _finish(self, module: Any, task: int) -> None:
        """Put exemplars of a learned task's classes into the memory."""
        if self.finished > task:
            return
        assert self.finished == task
        first, seen = self.seen(task - 1) if task else 0, self.seen(task)
        self.memory.store.to(module.device)
        module.end_task(first)
        exemplars = [self._ordered(module, label) for label in range(first, seen)]
        self.raw.add([own[: self.raw_per_class] for own in exemplars])
        self.memory.add([own[self.raw_per_class :] for own in exemplars])
        self._share_memories(seen)
        self.fallbacks += self.memory.fell_back
        self.finished = task + 1
        if rank() == 0:
            for name, memory in (("memory", self.memory), ("raw", self.raw)):
                memory.save(self.memory_folder / f"{name}.bin")

    def _share_memories(self, classes: int) -> None:
        """All processes go on with the files of the first, should theirs differ in a bit."""
        if world_size() == 1:
            return
        files = [self.raw.file, self.memory.file]
        torch.distributed.broadcast_object_list(files, src=0)
        for memory, file in zip((self.raw, self.memory), files):
            if memory.file != file:
                memory.load(file, classes, "the first process's memory")

    def _ordered(self, module: Any, label: int) -> Tensor:
        """Images of a class, the most important first."""
        images, _ = self.of_classes(label, label + 1)
        if self.selection == "herding":
            return images[herding(module.describe(images))]
        return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * self.seed + label))]

    # -- Lightning ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Stacks:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        task = self.task_at(module.updates)
        if task == len(self.task_updates):  # a finished run that is resumed
            return Stacks(lambda update: TensorDict(), self.updates_per_step, module.updates, module.updates)
        shape, pair_shape = (self.updates_per_step, self.share()), (self.updates_per_step, self._pair_share(module))

        def draw(update: int) -> TensorDict:
            # Not before: a run that resumes has its random state only once training begins.
            training = self._begin(module, task)
            generator = batch_generator(self.seed, update)
            image, label = training.images.draw(shape, generator)
            batch = {"image": image, "label": label}
            if training.pairs is not None:
                batch["pair"], batch["pair_label"] = training.pairs.draw(pair_shape, generator)
            return TensorDict(batch, batch_size=[self.updates_per_step])

        return Stacks(draw, self.updates_per_step, module.updates, sum(self.task_updates[: task + 1]))

    def _pair_share(self, module: Any) -> int:
        """The pairs that a process draws."""
        if getattr(module, "information_back", 0) and not self.pairs:
            raise ValueError("datamodule.pairs=0: expected 1 or more where module.information_back is above 0.")
        if self.pairs % world_size():
            raise ValueError(f"datamodule.pairs={self.pairs} can't be split over {world_size()} processes.")
        return self.pairs // world_size()

    def val_dataloader(self) -> "_TaskEnd":
        return _TaskEnd(partial(self._task, final=False))

    def test_dataloader(self) -> "_TaskEnd":
        return _TaskEnd(partial(self._task, final=True))

    def _task(self, final: bool) -> "ClassesTask":
        module = self.trainer.lightning_module
        task = int(module.task)
        if not final:
            self._finish(module, task)
        chosen = self.data.test_labels < self.seen(task)
        labels = self.data.test_labels[chosen]
        images = {"test": self.data.test_images[chosen]}
        if final:
            images["reconstructed"] = self._restored(images["test"])
        groups = (labels - self.base_classes).div(self.classes_per_task, rounding_mode="floor").clamp(min=-1) + 1
        accounts = self._accounts() if final and self.finished else {}
        return ClassesTask(images, labels, groups, task, accounts, final)

    def _accounts(self) -> dict[str, float]:
        """Bytes of the memory, and with the models that it takes."""
        payload = self.memory.bytes + self.raw.bytes
        models = self.memory.store.model_bytes()
        counts = self.memory.counts
        return {
            "images_per_class": sum(counts) / len(counts),
            "bytes_per_image": self.memory.bytes / max(1, sum(counts)),
            "fallbacks": self.fallbacks,
            "bytes": payload,
            "bytes_with_decoder": payload + models["reading"],
            "bytes_with_models": payload + models["all"],
        }

    def state_dict(self) -> dict[str, Any]:
        files = {name: _as_tensor(memory.file) for name, memory in (("memory", self.memory), ("raw", self.raw))}
        return {"finished": self.finished, "fallbacks": self.fallbacks, **files}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        tasks = len(self.task_updates)
        if state_dict["finished"] > tasks:
            raise ValueError(f"The checkpoint has finished {state_dict['finished']} tasks, expected at most {tasks}.")
        self.finished, self.fallbacks = state_dict["finished"], state_dict["fallbacks"]
        classes = self.seen(self.finished - 1) if self.finished else 0
        for name, memory in (("memory", self.memory), ("raw", self.raw)):
            memory.load(state_dict[name].numpy().tobytes(), classes, f"the checkpoint's {name}")


def _as_tensor(file: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(file, np.uint8).copy())


class _Balanced:
    """Images [n, ...] that are drawn so that each class is equally likely."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        order = labels.argsort(stable=True)
        self.images, self.labels = images[order].to(device), labels[order].to(device)
        counts = labels.bincount()
        ends = counts.cumsum(0)
        there = counts > 0
        self._begins, self._counts = (ends - counts)[there], counts[there]

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """[*shape, ...] images and their labels [*shape]."""
        drawn = torch.randint(len(self._counts), tuple(shape), generator=generator)
        inside = (torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * self._counts[drawn]).long()
        index = (self._begins[drawn] + inside).to(self.images.device)
        return self.images[index], self.labels[index]


@dataclass
class _TaskEnd:
    """A loader of the one evaluation task there is, made when it is asked for: Lightning makes loaders long before."""

    make: Callable[[], "ClassesTask"]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator["ClassesTask"]:
        yield self.make()


@dataclass
class _Training:
    """What a task is learned from."""

    task: int
    images: _Balanced
    pairs: _Balanced | None


class ClassesTask:
    """Test images of all classes seen so far.

    Args:
        images: by view, each [n, C, H, H]; ``test`` are the images as they are.
        labels: [n].
        groups: the task that each label came with, [n].
        task: the last one.
        accounts: numbers to report besides.
        final: report what a whole run comes to.
    """

    name = "test"
    rewards: tuple[str, ...] = ()  # nothing is rolled out, and there is nothing to film

    def __init__(
        self,
        images: dict[str, Tensor],
        labels: Tensor,
        groups: Tensor,
        task: int,
        accounts: dict[str, float],
        final: bool,
    ) -> None:
        self.images = images
        self.labels = labels
        self.groups = groups
        self.task = task
        self.accounts = accounts
        self.final = final

    def metrics(self, result: TensorDictBase) -> dict[str, list[float]]:
        """Accuracies in percent, of all classes seen so far."""
        tasks = self.task + 1
        overall, accuracies = result["overall"][:tasks], result["accuracies"][:tasks, :tasks]
        found = {"accuracy": overall[-1].item(), "classes": float(self.labels.max() + 1)}
        if self.final:
            found = {
                "average_incremental_accuracy": average_incremental_accuracy(overall),
                "last_accuracy": overall[-1].item(),
                "forgetting": forgetting(accuracies),
                "reconstructed_accuracy": 100 * (result["reconstructed"] == self.labels).double().mean().item(),
            }
        return {
            **{f"test/{name}": [value] for name, value in found.items()},
            **{f"memory/{name}": [float(value)] for name, value in self.accounts.items()},
        }


class CodecTask:
    """Test images that a codec is tried on.

    Args:
        name: of the metrics, as in ``base/psnr``.
        images: [n, C, H, H].
        codec: that is tried.
        coding: write them down by every stream, and read them again.
    """

    rewards: tuple[str, ...] = ()

    def __init__(self, name: str, images: Tensor, codec: ImageCodec, coding: bool) -> None:
        self.name = name
        self.images = images
        self.codec = codec
        self.coding = coding

    def metrics(self, result: TensorDictBase) -> dict[str, list[float]]:
        """PSNR in decibel, bits of an image."""
        error = (self.images.double() - result["reconstruction"].double()).square().mean().item()
        found = {"psnr": 10 * math.log10(255**2 / max(error, 1e-9)), "elbo_bits": result["rate"].mean().item()}
        found |= {
            name: result[name].item()
            for name in result.keys()  # noqa: SIM118 - a TensorDict iterates over its rows
            if name.endswith("_perplexity")
        }
        if self.coding:
            found |= self._coded(result["codes"])
        return {f"{self.name}/{name}": [value] for name, value in found.items()}

    def _coded(self, codes: Tensor) -> dict[str, float]:
        count, found = len(codes), {}
        for name in STREAMS:
            stream = self.codec.stream(name)
            payload = stream.pack(codes)
            if not torch.equal(stream.unpack(payload, count), codes):
                raise ValueError(f"{name}: codes did not come back as they were.")
            found[f"{name}_bits"] = 8 * len(payload) / count
            if name == "bits_back":
                found["bits_back_net_bits"] = stream.latest.net_bits / count
                found["bits_back_initial_bits"] = stream.latest.initial_bits
        saved = (found["static_bits"] - found["bits_back_bits"]) / 8
        if saved > 0:  # images from which on bits back saves more than its model takes beyond the frequencies
            sizes = self.codec.model_bytes()
            found["break_even_images"] = (sizes["code_model"] - sizes["frequencies"]) / saved
        return found
