"""Latent-variable models of the discrete codes of images, for bits-back coding.

Dimensions: n images, S codes of each, K values of a code, Z latents, B batch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.checks import NonNegative, Size, checked
from components.coding.vqvae import ResidualBlock
from components.distributed import average_


def place_frequencies(codes: Tensor, values: int) -> Tensor:
    """How often each place of codes [n, S] has each value, half an observation added to all: [S, K] float64."""
    places = codes.shape[1]
    numbered = codes + values * torch.arange(places, device=codes.device)
    counts = torch.bincount(numbered.flatten(), minlength=places * values).view(places, values).double() + 0.5
    return counts / counts.sum(1, keepdim=True)


@checked
class CategoricalVAE(nn.Module):
    """p(z) p(codes | z), with a standard normal z and codes that are labels: a softmax over their values.

    z has the size of the coarsest level's map. The model begins at the frequencies of each place, which are a strong
    local optimum: without free bits the latents would say nothing for ever.

    Args:
        code_shapes: height and width of each level's map, the coarsest first; of a second one, twice these.
        codes: K.
        width: channels.
        latent_channels: of z.
        embedding: size of the vector that a code is read as.
        free_bits: of each latent channel, mean over the batch: so much information costs nothing in training.

    Attributes:
        symbols: S.
        latents: (Z,).
    """

    def __init__(
        self,
        code_shapes: Sequence[tuple[Size, Size]],
        codes: Size,
        width: Size = 48,
        latent_channels: Size = 4,
        embedding: Size = 16,
        free_bits: NonNegative = 4.0,
    ) -> None:
        super().__init__()
        shapes = [tuple(shape) for shape in code_shapes]
        top = shapes[0]
        if shapes[1:] not in ([], [(2 * top[0], 2 * top[1])]):
            raise ValueError(f"code_shapes={shapes}: expected one level, or a second of twice the first's size.")
        self.code_shapes = shapes
        self.codes = codes
        self.free_bits = free_bits
        self.symbols = sum(height * width for height, width in shapes)
        self.latent_shape = (latent_channels, *top)
        self.latents = (math.prod(self.latent_shape),)
        inner = max(1, width // 2)
        self.embeddings = nn.ModuleList(nn.Embedding(codes, embedding) for _ in shapes)
        self.readers = nn.ModuleList([nn.Conv2d(embedding, width, 3, padding=1)])
        self.top_logits = nn.Conv2d(width, codes, 1)
        if len(shapes) > 1:
            self.readers.append(nn.Conv2d(embedding, width, 4, 2, 1))
            self.upsampling = nn.Sequential(nn.ConvTranspose2d(width, width, 4, 2, 1), ResidualBlock(width, inner))
            self.bottom_logits = nn.Conv2d(width, codes, 1)
        self.posterior = nn.Sequential(
            ResidualBlock(width, inner), nn.ReLU(), nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
        )
        self.generator = nn.Sequential(nn.Conv2d(latent_channels, width, 3, padding=1), ResidualBlock(width, inner))
        self.bias = nn.Parameter(torch.zeros(self.symbols, codes))

    @torch.no_grad()
    def begin(self, frequencies: Tensor) -> None:
        """Start from the frequencies [S, K] of each place."""
        self.bias.copy_(frequencies.log())

    def infer(self, layer: int, below: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n, Z] of q(z | codes), from codes [n, S]."""
        assert layer == 1
        parts = below.split([height * width for height, width in self.code_shapes], dim=1)
        read = sum(
            reader(embed(part).view(-1, *shape, embed.embedding_dim).permute(0, 3, 1, 2))
            for reader, embed, part, shape in zip(self.readers, self.embeddings, parts, self.code_shapes)
        )
        mean, raw = self.posterior(read).flatten(1).chunk(2, 1)
        # At most the prior's spread, at least a few steps of a grid of 1/32.
        return mean, 0.05 + 0.95 * torch.sigmoid(raw + 2)

    def generate(self, layer: int, above: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a single layer of latents has none below it")

    def logits(self, above: Tensor) -> Tensor:
        """Of p(codes | z), [n, S, K], from z [n, Z]."""
        x = self.generator(above.view(-1, *self.latent_shape))
        levels = [self.top_logits(x.relu())]
        if len(self.code_shapes) > 1:
            levels.append(self.bottom_logits(self.upsampling(x).relu()))
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1) + self.bias

    def rate(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of p(codes | z) [n], and of z beyond what its posterior gives back [n, channels]; one z drawn for each.

        Their sum is -ELBO in the mean.
        """
        mean, std = self.infer(1, codes)
        z = mean + std * torch.randn_like(mean)
        nats = nn.functional.cross_entropy(self.logits(z).transpose(1, 2), codes, reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log())
        return nats / math.log(2), divergence.view(len(codes), self.latent_shape[0], -1).sum(2) / math.log(2)

    def loss(self, codes: Tensor, latent_weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """What to minimise, in bits of an image, and the rate that it stands for.

        Args:
            codes: [B, S].
            latent_weight: of the latents' bits, which are let in slowly.
        """
        data, latent = self.rate(codes)
        latent = latent.mean(0)
        over_all = latent.detach().clone()
        average_([over_all])  # what is free is decided by the whole batch
        charged = torch.where(over_all > self.free_bits, latent, self.free_bits)
        loss = data.mean() + latent_weight * charged.sum()
        return loss, (data.mean() + latent.sum()).detach()
