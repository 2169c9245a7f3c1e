"""Exponential moving averages of parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def polyak_update(target: Iterable[Tensor], source: Iterable[Tensor], rate: float) -> None:
    """Move every target tensor the fraction `rate` of the way to its source, in place, as one fused operation."""
    torch._foreach_lerp_(list(target), list(source), rate)
