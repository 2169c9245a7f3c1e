"""What data-parallel learning needs of `torch.distributed`; the identity where there is one process."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, [N, ...] -> [world_size * N, ...], without gradient."""
    size = world_size()
    if size == 1:
        return x
    x = x.contiguous()
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x)
    return gathered


def gather_with_gradient(x: Tensor) -> Tensor:
    """As `gather_rows`; gradients of all processes' losses reach the rows' own process, where they are summed."""
    if world_size() == 1:
        return x
    return torch.cat(dist.nn.functional.all_gather(x))


def own_rows(x: Tensor) -> Tensor:
    """The rows of this process in what `gather_rows` returned."""
    return x.chunk(world_size())[rank()]


@torch.no_grad()
def sum_(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over processes, in place, as one flat message."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Average tensors over processes, in place, as one flat message."""
    sum_(tensors)
    if world_size() > 1 and tensors:
        torch._foreach_div_(list(tensors), world_size())


@torch.no_grad()
def broadcast_(tensor: Tensor) -> None:
    """Give all processes the tensor of the first, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
