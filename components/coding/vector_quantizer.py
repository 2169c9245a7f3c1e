"""Vector quantisation with a codebook that follows averages: the discrete bottleneck of VQ-VAE.

Van den Oord et al., arXiv 1711.00937; Razavi et al., arXiv 1906.00446 (averages instead of a codebook loss).

Dimensions: N vectors, D their size, K codes.
"""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from components.checks import Momentum, NonNegative, Positive, Range, Size, checked
from components.distributed import broadcast_, sum_

Codes = Annotated[int, Range(2, 2**16)]


class Quantised(NamedTuple):
    """What a quantiser makes of vectors [..., D].

    Attributes:
        values: [..., D], codes' vectors; the gradient goes straight through to what was quantised.
        index: [...], int64, of the code.
        commitment: scalar, mean squared distance between vectors and their codes, the gradient to the vectors alone.
    """

    values: Tensor
    index: Tensor
    commitment: Tensor


@checked
class VectorQuantizer(nn.Module):
    """Replaces vectors by the nearest of K codes; the first, where several are equally near.

    In training mode each call moves the codebook, after the vectors have been looked up in the one before: counts and
    sums of the vectors of each code are averaged over time, and a code is their quotient. The very first call makes
    codes of vectors drawn from its batch. A code that is used by less than a share of its due is dead, and replaced by
    a vector drawn from the batch. Processes average together.

    In evaluation mode nothing changes, which is what makes stored codes lasting: a frozen quantiser has to stay in it.

    Args:
        dim: D.
        codes: K.
        decay: of the averages.
        eps: of Laplace's smoothing of the counts.
        restart_below: share of 1/K of the vectors below which a code is dead; 0 for never.
    """

    def __init__(
        self, dim: Size, codes: Codes, decay: Momentum = 0.99, eps: Positive = 1e-5, restart_below: NonNegative = 0.05
    ) -> None:
        super().__init__()
        self.dim = dim
        self.codes = codes
        self.decay = decay
        self.eps = eps
        self.restart_below = restart_below
        self.register_buffer("codebook", torch.randn(codes, dim))
        # Averages that began at zero would blow up the codes that the first batches do not use.
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def forward(self, z: Tensor) -> Quantised:
        """Quantise vectors [..., D]."""
        if self.training:
            drawn = self._draw(z.detach().reshape(-1, self.dim))
            self._begin(drawn)
        index = self.nearest(z)
        values = self.look_up(index).to(z.dtype)
        commitment = (z - values).square().mean()
        straight = values + (z - z.detach())  # to the bit what the codes are decoded from
        if self.training:
            self._follow(z.detach().reshape(-1, self.dim), index.flatten(), drawn)
        return Quantised(straight, index, commitment)

    def nearest(self, z: Tensor) -> Tensor:
        """[..., D] -> [...], int64. In the codebook's precision, whatever the vectors' is."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.detach().to(self.codebook.dtype)
            distance = self.codebook.square().sum(1) - 2 * z @ self.codebook.T  # less |z|^2, the same for all codes
            return distance.argmin(-1)

    def look_up(self, index: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        return self.codebook[index]

    def _draw(self, z: Tensor) -> Tensor:
        """K vectors of the batch [N, D], the same in all processes."""
        drawn = z[torch.randint(len(z), (self.codes,), device=z.device)].to(self.codebook.dtype)
        broadcast_(drawn)
        return drawn

    @torch.no_grad()
    def _begin(self, drawn: Tensor) -> None:
        self.codebook.copy_(torch.where(self.begun, self.codebook, drawn))
        self.sums.copy_(torch.where(self.begun, self.sums, drawn))
        self.begun.fill_(True)

    @torch.no_grad()
    def _follow(self, z: Tensor, index: Tensor, drawn: Tensor) -> None:
        # A product instead of index_add_, which on a GPU adds in any order.
        members = nn.functional.one_hot(index, self.codes).to(self.sums.dtype)
        counts, sums = members.sum(0), members.T @ z.to(self.sums.dtype)
        sum_([counts, sums])
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        due = total / self.codes
        dead = self.counts < self.restart_below * due
        self.counts.copy_(torch.where(dead, due, self.counts))
        self.sums.copy_(torch.where(dead[:, None], drawn * due, self.sums))
        smoothed = (self.counts + self.eps) / (total + self.codes * self.eps) * total
        self.codebook.copy_(self.sums / smoothed[:, None])


def perplexity(index: Tensor, codes: int) -> Tensor:
    """How many codes are in use: 2 to the entropy (in bits) of their frequencies among indices [...]."""
    share = torch.bincount(index.flatten(), minlength=codes).float() / index.numel()
    return torch.special.entr(share).sum().exp()
