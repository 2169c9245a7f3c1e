"""What learning one group of classes after another takes: exemplars, heads, and how it is judged.

Dimensions: n images, F features, N classes, T tasks.
"""

import torch
from torch import Tensor, nn


def herding(features: Tensor) -> Tensor:
    """An order [n] of rows in which the mean of the first ones follows that of all (iCaRL, arXiv 1611.07725).

    Args:
        features: [n, F], normalised here.
    """
    features = nn.functional.normalize(features.double(), dim=1)
    target, total = features.mean(0), torch.zeros_like(features[0])
    order, left = [], torch.ones(len(features), dtype=torch.bool, device=features.device)
    for count in range(1, len(features) + 1):
        distance = (target - (total + features) / count).norm(dim=1).masked_fill(~left, float("inf"))
        chosen = int(distance.argmin())
        order.append(chosen)
        left[chosen] = False
        total = total + features[chosen]
    return torch.tensor(order)


def align_weights(weight: Tensor, known: int, seen: int) -> None:
    """Scale rows known .. seen - 1 of a head's weight [N, F] to the mean norm of rows 0 .. known - 1, in place."""
    old, new = weight[:known], weight[known:seen]
    new *= old.norm(dim=1).mean() / new.norm(dim=1).mean()


def average_incremental_accuracy(overall: Tensor) -> float:
    """Mean over tasks of the accuracy on all classes seen by then, [T], the first task included."""
    return overall.mean().item()


def forgetting(accuracies: Tensor) -> float:
    """Mean over all tasks but the last of what was lost since the best; 0 with a single task.

    Args:
        accuracies: [T, T], after each task (row) on the classes of each (column), 0 for those to come.
    """
    lost = (accuracies.max(0).values - accuracies[-1])[:-1]
    return lost.mean().item() if len(lost) else 0.0
