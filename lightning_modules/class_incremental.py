"""Learning one group of classes after another, with exemplars of the old ones.

Jiang, Cetin and Celiktutan, "IB-DRR: Incremental Learning with Information-Back Discrete Representation Replay", arXiv
2104.10588. What is replayed, and at how many bytes, is the datamodule's; here is the classifier.

Dimensions: B images, C channels, H height and width, F features, N classes in all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from components.checks import Count, NonNegative, Number, Positive, Share, Size, checked
from components.coding.class_incremental import align_weights
from components.coding.contrastive import supervised_contrastive_loss
from components.distributed import average_, broadcast_, rank
from lightning_modules.base import LearningMethod


@checked
class ClassIncremental(LearningMethod):
    """A classifier of all classes seen so far, one head for all, that starts each task with what it knows.

    A batch has `image` [B, C, H, H] uint8 and `label` [B], classes in the order in which they come. For Information
    Back it has `pair` [P, 2, C, H, H] too, images beside what the memory would make of them, and `pair_label` [P]: a
    supervised contrastive loss pulls both views of a class together, so that reconstructions are read as what they
    stand for.

    At the start of each task the head's rows of its classes are made anew, and the optimiser begins anew.

    Args:
        image_shape: (C, H, H).
        classes: N.
        network: makes the features, called with `image_shape`; has `features`, F.
        task_updates: updates of each task.
        optimizer: makes the optimiser, called with parameters.
        milestones: shares of a task after which the learning rate falls to a tenth.
        augmentation: of a batch of images in training, [B, C, H, H] -> the same; None for none.
        mean, std: of pixels from 0 to 1, by which they are normalised.
        information_back: weight of the contrastive loss; 0 leaves it and its projection out.
        pairs: positives of the contrastive loss: all views of a ``class``, or only the other view of the ``instance``.
        temperature: of the contrastive loss.
        align: after each task but the first, scale the head's new rows to the mean norm of the old ones (weight
            aligning, Zhao et al., arXiv 1911.07053).
        settings: further arguments of `LearningMethod`.
    """

    progress_bar_metrics = ("loss", "accuracy")
    kept = ("task", "seen", "accuracies", "overall", "mean", "std")

    def __init__(
        self,
        image_shape: Sequence[Size],
        classes: Size,
        *,
        network: Callable[..., nn.Module],
        task_updates: Sequence[Count],
        optimizer: Callable[..., torch.optim.Optimizer],
        milestones: Sequence[Share] = (),
        augmentation: nn.Module | None = None,
        mean: Sequence[Number] | Number = 0.5,
        std: Sequence[Positive] | Positive = 0.5,
        information_back: NonNegative = 0.0,
        pairs: str = "class",
        temperature: Positive = 0.1,
        align: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if sum(task_updates) != self.total_updates:
            raise ValueError(f"updates={self.total_updates}: expected the sum of task_updates, {sum(task_updates)}.")
        if pairs not in ("class", "instance"):
            raise ValueError(f"Unknown pairs={pairs!r}: expected class or instance.")
        self.classes = classes
        self.task_updates = list(task_updates)
        self.milestones = list(milestones)
        self.augmentation = nn.Identity() if augmentation is None else augmentation
        self.information_back = information_back
        self.pairs = pairs
        self.temperature = temperature
        self.align = align
        self.network = network(image_shape=image_shape)
        self.head = nn.Linear(self.network.features, classes)
        self.projection = _projection(self.network.features) if information_back else None
        for name, value in (("mean", mean), ("std", std)):
            if isinstance(value, Sequence) and len(value) != image_shape[0]:
                raise ValueError(f"{name}={list(value)}: expected a number for each of {image_shape[0]} channels.")
            per_channel = torch.tensor(value, dtype=torch.float32).expand(image_shape[0]).clone()
            self.register_buffer(name, per_channel.view(-1, 1, 1))
        self.register_buffer("task", torch.tensor(-1))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))
        # Accuracy on each task's classes (column) after each task (row), and on all that were seen.
        tasks = len(self.task_updates)
        self.register_buffer("accuracies", torch.zeros(tasks, tasks))
        self.register_buffer("overall", torch.zeros(tasks))
        self.optimizer = self.register_optimizer(optimizer(self.trained()))

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())

    # -- tasks --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_task(self, task: int, seen: int) -> None:
        """From here on there are `seen` classes; nothing happens in the middle of a task."""
        if int(self.task) == task:
            return
        self.task.fill_(task)
        fresh = nn.Linear(self.head.in_features, self.classes, device=self.device)
        new = ~self.seen & (torch.arange(self.classes, device=self.device) < seen)
        self.head.weight.copy_(torch.where(new[:, None], fresh.weight, self.head.weight))
        self.head.bias.copy_(torch.where(new, fresh.bias, self.head.bias))
        self.seen |= new
        made = [self.head.weight, self.head.bias]
        if self.projection is not None:
            for layer in self.projection:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            made += self.projection.parameters()
        for parameter in made:
            broadcast_(parameter)
        for state in self.optimizer.state.values():  # in place: a captured graph holds on to these tensors
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    @torch.no_grad()
    def end_task(self, known: int) -> None:
        """A task is learned, before which there were `known` classes."""
        if self.align and known:
            align_weights(self.head.weight, known, int(self.seen.sum()))

    def learning_rate_factors(self) -> list[float]:
        done = self.updates
        for length in self.task_updates:
            if done < length:
                break
            done -= length
        return [0.1 ** sum(done >= milestone * length for milestone in self.milestones)]

    # -- the learning rule --------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, H] uint8 -> [B, F]."""
        return self.network((images.float() / 255 - self.mean) / self.std)

    def logits(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, N], those of classes not seen yet minus infinity."""
        return self.head(features).masked_fill(~self.seen, -torch.inf)

    def update(self, batch: TensorDict) -> TensorDict:
        logits = self.logits(self.features(self.augmentation(batch["image"])))
        loss = nn.functional.cross_entropy(logits, batch["label"])
        metrics = {"classifier_loss": loss, "accuracy": 100 * (logits.argmax(1) == batch["label"]).float().mean()}
        if self.projection is not None:
            contrast = self.contrastive_loss(batch["pair"], batch["pair_label"])
            metrics["contrastive_loss"] = contrast
            loss = loss + self.information_back * contrast
        self.minimise(loss, self.optimizer)
        metrics = {"loss": loss, **metrics}
        return TensorDict({name: value.detach() for name, value in metrics.items()})

    def run_update(self, batch: TensorDict) -> TensorDict:
        metrics = super().run_update(batch)
        # Batch normalisation sees a process's own share of a batch; its running statistics are those of all.
        average_([buffer for buffer in self.network.buffers() if buffer.is_floating_point()])
        return metrics

    def contrastive_loss(self, pair: Tensor, label: Tensor) -> Tensor:
        """Of images beside their reconstructions [P, 2, C, H, H], each augmented by itself, and their classes [P]."""
        views = torch.cat([pair[:, 0], pair[:, 1]])
        if self.pairs == "instance":
            label = rank() * len(label) + torch.arange(len(label), device=label.device)
        projected = self.projection(self.features(self.augmentation(views)))
        return supervised_contrastive_loss(projected, label.repeat(2), self.temperature)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, task: Any) -> TensorDict:
        """Predictions for an evaluation task's images, and the accuracies after each task so far."""
        predicted = {name: self.predict(images) for name, images in task.images.items()}
        correct = (predicted["test"] == task.labels).double() * 100
        row = int(self.task)
        for column in range(row + 1):
            self.accuracies[row, column] = correct[task.groups == column].mean()
        self.overall[row] = correct.mean()
        return TensorDict({**predicted, "accuracies": self.accuracies.cpu(), "overall": self.overall.cpu()})

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """[n, C, H, H] uint8 -> [n] classes, on the CPU."""
        parts = [self.logits(self.features(part.to(self.device))).argmax(1).cpu() for part in images.split(1000)]
        return torch.cat(parts)

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Features [n, F] of images [n, C, H, H] uint8, on the CPU; what exemplars are chosen by."""
        with self.evaluation():
            return torch.cat([self.features(part.to(self.device)).float().cpu() for part in images.split(1000)])


def _projection(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 128))
