"""Supervised contrastive loss (Khosla et al., arXiv 2004.11362).

Dimensions: N views, F features.
"""

import torch
from torch import Tensor, nn

from components.distributed import gather_rows, gather_with_gradient, own_rows


def supervised_contrastive_loss(features: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over views of -log of their likeness to views with the same label, among all others.

        -1 / |P(a)| sum over p in P(a) of log [ exp(g_a . g_p / T) / sum over b != a of exp(g_a . g_b / T) ]

    where P(a) are the other views with the label of a; a view without any counts 0. Where all labels come in pairs it
    is InfoNCE. The views of all processes are compared with each other.

    Args:
        features: [N, F], normalised here.
        labels: [N].
        temperature: T.
    """
    own = nn.functional.normalize(features.float(), dim=1)
    every, all_labels = gather_with_gradient(own), gather_rows(labels)
    likeness = own @ every.T / temperature
    itself = own_rows(torch.arange(len(every), device=own.device))[:, None] == torch.arange(
        len(every), device=own.device
    )
    log_share = likeness.masked_fill(itself, -torch.inf).log_softmax(1)
    alike = (labels[:, None] == all_labels) & ~itself
    each = -log_share.masked_fill(~alike, 0.0).sum(1) / alike.sum(1).clamp(min=1)
    return each.mean()
