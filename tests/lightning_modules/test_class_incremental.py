from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from components.coding.contrastive import supervised_contrastive_loss
from components.networks.classifiers import CropAndFlip, SmallConvNet
from lightning_modules.class_incremental import ClassIncremental

SHAPE = (1, 8, 8)


def made(**settings) -> ClassIncremental:
    torch.manual_seed(0)
    defaults = {
        "network": partial(SmallConvNet, channels=(4,), features=6),
        "task_updates": [4, 3, 3],
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "updates": 10,
        "log_every": 1,
    }
    return ClassIncremental(SHAPE, 6, **{**defaults, **settings})


def batch(classes: int = 2, count: int = 12, pairs: bool = False, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)

    def images(*shape: int) -> torch.Tensor:
        return torch.randint(256, (*shape, *SHAPE), generator=generator, dtype=torch.uint8)

    content = {"image": images(count), "label": torch.arange(count) % classes}
    if pairs:
        content |= {"pair": images(count, 2), "pair_label": torch.arange(count) % classes}
    return TensorDict(content, batch_size=[count])


def test_another_run_gives_its_network_and_the_first_task_begins():
    module = made()
    module.begin_task(0, 2)
    module.update(batch())
    other = made(task_updates=[4, 6], mean=0.3)  # accuracies of fewer tasks
    other.begin_from({"state_dict": module.state_dict()})
    found, expected = other.network.state_dict(), module.network.state_dict()
    assert found
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (int(other.task), int(other.seen.sum())) == (-1, 0)
    assert other.mean.item() == pytest.approx(0.3)


def test_loss_is_the_cross_entropy_of_classes_seen():
    module = made()
    module.begin_task(0, 2)
    data = batch()
    features = module.network((data["image"].float() / 255 - 0.5) / 0.5)
    expected = torch.nn.functional.cross_entropy(module.head(features)[:, :2], data["label"])
    torch.testing.assert_close(module.update(data)["loss"], expected.detach())
    assert not module.head.weight.grad[2:].any()
    assert set(module.predict(data["image"]).tolist()) <= {0, 1}


def test_a_new_task_keeps_old_rows_and_makes_new_ones_and_forgets_the_optimiser():
    module = made()
    module.begin_task(0, 2)
    module.update(batch())
    before = module.head.weight.clone()
    module.begin_task(1, 4)
    assert torch.equal(module.head.weight[:2], before[:2])
    assert torch.equal(module.head.weight[4:], before[4:])
    assert not (module.head.weight[2:4] == before[2:4]).any()
    states = [value for state in module.optimizer.state.values() for value in state.values()]
    assert states
    assert not any(value.any() for value in states)
    assert module.seen.tolist() == [True] * 4 + [False] * 2
    module.update(batch(4))
    after = module.head.weight.clone()
    module.begin_task(1, 4)  # a run that is resumed in the middle of it
    assert torch.equal(module.head.weight, after)
    assert any(value.any() for state in module.optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("pairs", ["class", "instance"])
def test_information_back_adds_the_contrast_of_both_views(pairs):
    module = made(information_back=0.5, pairs=pairs, temperature=0.2)
    module.begin_task(0, 2)
    data = batch(pairs=True)
    views = torch.cat([data["pair"][:, 0], data["pair"][:, 1]])
    label = data["pair_label"] if pairs == "class" else torch.arange(12)
    contrast = supervised_contrastive_loss(module.projection(module.features(views)), label.repeat(2), 0.2)
    expected = torch.nn.functional.cross_entropy(module.logits(module.features(data["image"])), data["label"])
    metrics = module.update(data)
    torch.testing.assert_close(metrics["contrastive_loss"], contrast.detach())
    torch.testing.assert_close(metrics["loss"], (expected + 0.5 * contrast).detach())
    assert made().projection is None


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
def test_a_state_of_zeros_is_a_fresh_optimiser(optimizer):
    module = made(optimizer=optimizer)
    module.begin_task(0, 2)
    module.update(batch())
    module.begin_task(1, 4)
    fresh = made(optimizer=optimizer)
    fresh.load_state_dict(module.state_dict())
    for each in (module, fresh):
        each.update(batch(4))
    for one, another in zip(module.parameters(), fresh.parameters()):
        assert torch.equal(one, another)


def test_learning_rates_fall_within_each_task():
    module = made(milestones=[0.5])
    found = []
    for update in range(10):
        module.updates = update
        module._anneal()
        found.append(module.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-2, 1e-2, 1e-3, 1e-2, 1e-2, 1e-3])


def test_accuracies_of_each_tasks_classes_are_kept():
    module = made()
    module.begin_task(0, 2)
    module.begin_task(1, 4)
    labels = torch.arange(4).repeat(5)
    images = batch(count=20)["image"]
    result = module.evaluate(SimpleNamespace(images={"test": images}, labels=labels, groups=labels // 2))
    right = result["test"] == labels
    assert result["overall"][1].item() == pytest.approx(100 * right.float().mean().item())
    for group in range(2):
        own = right[labels // 2 == group]
        assert result["accuracies"][1, group].item() == pytest.approx(100 * own.float().mean().item())
    assert result["accuracies"][1, 2] == 0


def test_aligning_is_left_out_after_the_first_task():
    module = made(align=True)
    module.begin_task(0, 2)
    before = module.head.weight.clone()
    module.end_task(0)
    assert torch.equal(module.head.weight, before)
    module.begin_task(1, 4)
    module.end_task(2)
    norms = module.head.weight.norm(dim=1)
    torch.testing.assert_close(norms[2:4].mean(), norms[:2].mean())


def test_compiled_updates_are_the_eager_ones():
    found = []
    for mode in (None, "default"):
        module = made(compile=mode, information_back=0.5, augmentation=CropAndFlip(1))
        module.begin_task(0, 2)
        torch.manual_seed(1)
        for step in range(3):
            metrics = module.run_update(batch(pairs=True, seed=step))
        found.append(metrics["loss"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 11}, "updates=11: expected the sum of task_updates, 10"),
        ({"pairs": "x"}, "Unknown pairs='x'"),
        ({"std": [0.2, 0.3]}, r"std=\[0.2, 0.3\]: expected a number for each of 1 channels"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)
