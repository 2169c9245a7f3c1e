from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.coding.exemplars import PillowStore, RawStore
from datamodules.images.class_incremental import ClassIncrementalDataModule, _Balanced
from datamodules.images.readers import LabelledImages


def labelled(per_class: int = 12, classes: int = 6, size: int = 6) -> LabelledImages:
    """Images whose first pixel is their label, mixed; the rest is different in each."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(classes).repeat(count)[torch.randperm(count * classes, generator=generator)]
        images = torch.randint(256, (len(labels), 1, size, size), generator=generator, dtype=torch.uint8)
        images[:, 0, 0, 0] = labels.to(torch.uint8)
        return images, labels

    return LabelledImages(*drawn(per_class), *drawn(5))


class Recorder(SimpleNamespace):
    """Stands for a method."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(updates=0, task=torch.tensor(-1), told=[])

    def begin_task(self, task: int, seen: int) -> None:
        self.task.fill_(task)
        self.told.append(("begin", task, seen))

    def end_task(self, known: int) -> None:
        self.told.append(("end", known))

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(module: Recorder | None = None, **settings) -> ClassIncrementalDataModule:
    defaults = {
        "memory_folder": "memory",
        "base_classes": 2,
        "classes_per_task": 2,
        "batch_size": 8,
        "task_updates": [3, 2, 2],
        "store": RawStore,
        "bytes_per_class": 2 * 36,
    }
    data = ClassIncrementalDataModule(labelled, **{**defaults, **settings})
    data.trainer = SimpleNamespace(lightning_module=module or Recorder())
    return data


def run(data: ClassIncrementalDataModule, stop: int = 7) -> list:
    """All batches up to an update, as Lightning would ask for them."""
    module, batches = data.trainer.lightning_module, []
    while module.updates < stop:
        loader = data.train_dataloader()
        for batch in loader:
            batches.append(batch)
            module.updates += data.updates_per_step
            if module.updates == stop and module.updates < loader.stop:
                return batches
        list(data.val_dataloader())
    return batches


def test_classes_come_in_the_order_of_published_protocols():
    data = made(order_seed=1993)
    order = np.random.RandomState(1993).permutation(6)
    assert torch.equal(data.data.images[:, 0, 0, 0].long(), torch.from_numpy(order)[data.data.labels])
    assert torch.equal(data.data.test_images[:, 0, 0, 0].long(), torch.from_numpy(order)[data.data.test_labels])
    assert data.spec == {"image_shape": [1, 6, 6], "classes": 6}
    assert np.random.RandomState(1993).permutation(10).tolist() == [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]
    assert [data.task_at(update) for update in range(8)] == [0, 0, 0, 1, 1, 2, 2, 3]
    few = made(per_class=4, test_per_class=3, order_seed=None).data
    assert few.labels.bincount().tolist() == [4] * 6
    assert few.test_labels.bincount().tolist() == [3] * 6


def test_the_first_classes_of_an_order_can_be_used_alone():
    every, some = made().data, made(classes=4, task_updates=[3, 2]).data
    assert some.labels.bincount().tolist() == [12] * 4
    assert some.test_labels.bincount().tolist() == [5] * 4
    assert torch.equal(some.images, every.images[every.labels < 4])
    assert torch.equal(some.test_images, every.test_images[every.test_labels < 4])


class Lossless(RawStore):
    """Stands for a codec that loses nothing: other items, the same images."""

    def shrink(self, images: torch.Tensor) -> torch.Tensor:
        return 255 - images

    def restore(self, items: torch.Tensor) -> torch.Tensor:
        return 255 - items


@pytest.mark.parametrize("view", ["raw", "reconstructed"])
def test_a_codec_that_loses_nothing_is_plain_replay(view):
    plain = run(made(view="raw"))
    coded = run(made(view=view, store=Lossless))
    for one, another in zip(plain, coded, strict=True):
        assert torch.equal(one["image"], another["image"])
        assert torch.equal(one["label"], another["label"])


@pytest.mark.parametrize(
    ("budget", "last"), [(0, {4, 5}), (None, {0, 1, 2, 3, 4, 5})], ids=["fine-tuning", "joint training"]
)
def test_limits_of_the_budget(budget, last):
    data = made(bytes_per_class=budget, order_seed=None, batch_size=512, view="raw", task_updates=[1, 1, 2])
    *_, batch = run(data, 4)
    assert set(batch["label"].flatten().tolist()) == last
    found = batch["image"][0].flatten(1).unique(dim=0)
    own = torch.stack([image for image, label in zip(data.data.images, data.data.labels) if label.item() in last])
    assert torch.equal(found, own.flatten(1).unique(dim=0))


def test_a_task_has_its_own_images_and_the_exemplars_of_those_before():
    module = Recorder()
    data = made(module, order_seed=None, batch_size=64, view="raw")
    batches = run(data)
    assert module.told == [("begin", 0, 2), ("end", 0), ("begin", 1, 4), ("end", 2), ("begin", 2, 6), ("end", 4)]
    assert [sorted(set(batch["label"].flatten().tolist())) for batch in batches] == [
        *[[0, 1]] * 3,
        *[[0, 1, 2, 3]] * 2,
        *[[0, 1, 2, 3, 4, 5]] * 2,
    ]
    for batch in batches:
        assert torch.equal(batch["image"][..., 0, 0, 0].long(), batch["label"])
    last = torch.cat([batch["image"].flatten(0, 1) for batch in batches[-2:]])
    for label in range(4):  # two exemplars of each old class
        assert len(last[last[:, 0, 0, 0] == label].flatten(1).unique(dim=0)) == 2
    assert data.memory.counts == [2] * 6
    assert data.finished == 3
    assert Path("memory/memory.bin").read_bytes() == data.memory.file
    assert sorted(path.name for path in Path("memory").iterdir()) == ["memory.bin", "raw.bin"]


def test_every_class_that_is_there_is_equally_likely():
    images = torch.arange(103)[:, None, None, None].to(torch.uint8)
    labels = torch.tensor([0] * 100 + [2] * 3)
    drawn, found = _Balanced(images, labels, torch.device("cpu")).draw((2, 3000), torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 3000, 1, 1, 1)
    assert torch.equal(labels[drawn.flatten().long()], found.flatten())
    assert abs((found == 2).float().mean().item() - 0.5) < 0.03
    counts = drawn.flatten().long().bincount(minlength=103)
    assert counts[:100].min() > 5
    assert (counts[100:].float() / 1000 - 1).abs().max() < 0.12


@pytest.mark.parametrize(("view", "expected"), [("raw", {0.0}), ("reconstructed", {1.0}), ("both", {0.0, 1.0})])
def test_views_of_a_tasks_own_images(view, expected):
    store = partial(PillowStore, format="jpeg", quality=10)
    data = made(store=store, view=view, order_seed=None, batch_size=64, bytes_per_class=None)
    plain = {tuple(image.flatten().tolist()) for image in data.data.images}
    first, *_, last = run(data)

    def restored(batch, labels: set[int]) -> set[float]:
        pictures = zip(batch["image"].flatten(0, 1), batch["label"].flatten().tolist())
        return {float(tuple(image.flatten().tolist()) not in plain) for image, label in pictures if label in labels}

    assert restored(first, {0, 1}) == expected
    assert restored(last, {4, 5}) == expected
    assert restored(last, {0, 1, 2, 3}) == {1.0}  # old ones are only ever seen as the memory restores them


def test_pairs_are_images_beside_their_reconstructions():
    store = partial(PillowStore, format="jpeg", quality=10)
    data = made(store=store, order_seed=None, pairs=16, raw_per_class=1, bytes_per_class=300)
    batches = run(data)
    for batch in (batches[0], batches[-1]):
        pair = batch["pair"][0]
        assert pair.shape == (16, 2, 1, 6, 6)
        assert torch.equal(pair[:, 0, 0, 0, 0].long(), batch["pair_label"][0])
        again = data.memory.store
        assert torch.equal(again.restore(again.shrink(pair[:, 0])), pair[:, 1])
    assert set(torch.cat([b["pair_label"].flatten() for b in batches[-2:]]).tolist()) == set(range(6))
    assert data.raw.counts == [1] * 6
    assert data.raw.bytes == 6 * 36


def test_herding_chooses_by_features():
    data = made(order_seed=None, selection="herding", view="raw")
    run(data, 3)
    own = data.of_classes(0, 1)[0]
    mean = torch.nn.functional.normalize(own.flatten(1).double(), dim=1).mean(0)
    unit = torch.nn.functional.normalize(own.flatten(1).double(), dim=1)
    closest = (unit - mean).norm(dim=1).argmin()
    assert torch.equal(data.memory.items[0][0], own[closest])


def test_it_goes_on_in_the_middle_of_a_task():
    whole = run(made())
    data = made()
    before = run(data, 4)
    saved = data.state_dict()
    other = made(Recorder())
    other.load_state_dict(saved)
    other.trainer.lightning_module.updates = 4
    after = run(other)
    for found, expected in zip([*before, *after], whole, strict=True):
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["label"], expected["label"])
    damaged = {**saved, "memory": saved["memory"].clone()}
    damaged["memory"][30] ^= 1
    with pytest.raises(ValueError, match="the checkpoint's memory: expected a whole file of exemplars"):
        made().load_state_dict(damaged)


def test_scores_are_of_all_classes_seen():
    data = made(order_seed=None)
    run(data, 5)
    (task,) = data.val_dataloader()
    assert task.groups.bincount().tolist() == [10, 10]
    assert torch.equal(task.groups, task.labels // 2)
    result = {
        "overall": torch.tensor([90.0, 70.0, 0.0]),
        "accuracies": torch.tensor([[90.0, 0, 0], [60.0, 80.0, 0], [0, 0, 0]]),
    }
    found = task.metrics(result)
    assert found["test/accuracy"] == [70.0]
    assert found["test/classes"] == [4.0]
    (task,) = data.test_dataloader()
    found = task.metrics({**result, "reconstructed": task.labels})
    assert found["test/average_incremental_accuracy"] == [80.0]
    assert found["test/forgetting"] == [30.0]
    assert found["test/reconstructed_accuracy"] == [100.0]
    assert found["memory/bytes"] == found["memory/bytes_with_models"] == [4 * 2 * 36]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_updates": [3, 2]}, r"task_updates=\[3, 2\]: expected 3 numbers, one for each task"),
        ({"base_classes": 3}, "base_classes=3, classes_per_task=2: expected to make up the 6 classes"),
        ({"classes": 5}, "base_classes=2, classes_per_task=2: expected to make up the 5 classes"),
        ({"classes": 8}, "classes=8: expected at most the data's 6"),
        ({"view": "x"}, "Unknown view='x'"),
        ({"selection": "x"}, "Unknown selection='x'"),
        ({"updates_per_step": 2}, r"task_updates\[0\]=3 is no multiple of 2"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)
