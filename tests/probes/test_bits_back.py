"""Bits back on raw pictures: small variational autoencoders of digits, with one layer of latents and with two."""

import math

import pytest
import torch
from torch import Tensor, nn

from components.coding.bits_back import BitsBackCoder
from datamodules.images.readers import digits

LEVELS = 17


class PixelVAE(nn.Module):
    """p(z_L) ... p(x | z_1) of 64 pixels with 17 levels, by dense layers."""

    symbols = 64

    def __init__(self, latents: tuple[int, ...], hidden: int = 64) -> None:
        super().__init__()
        self.latents = latents

        def network(inside: int, outside: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inside, hidden), nn.ELU(), nn.Linear(hidden, outside))

        sizes = (self.symbols, *latents)
        self.up = nn.ModuleList(network(sizes[layer], 2 * size) for layer, size in enumerate(latents))
        self.down = nn.ModuleList(network(latents[layer + 1], 2 * size) for layer, size in enumerate(latents[:-1]))
        self.out = network(latents[0], self.symbols * LEVELS)

    def infer(self, layer: int, below: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.out[0].weight
        return self._moments(self.up[layer - 1](below.to(weight.dtype) / (8 if layer == 1 else 1)))

    def generate(self, layer: int, above: Tensor) -> tuple[Tensor, Tensor]:
        return self._moments(self.down[layer - 1](above))

    def _moments(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = raw.chunk(2, 1)
        return mean, 0.05 + 0.95 * torch.sigmoid(spread + 2)

    def logits(self, above: Tensor) -> Tensor:
        return self.out(above).view(-1, self.symbols, LEVELS)

    def rate(self, x: Tensor) -> Tensor:
        """-ELBO in bits [n], one sample of the latents for each."""
        below, above, bits = x, None, 0.0
        samples = []
        for layer in range(1, len(self.latents) + 1):
            mean, std = self.infer(layer, below)
            above = mean + std * torch.randn_like(mean)
            bits = bits + torch.distributions.Normal(mean, std).log_prob(above).sum(1)
            samples.append(above)
            below = above
        bits = bits - torch.distributions.Normal(0.0, 1.0).log_prob(samples[-1]).sum(1)
        for layer in range(len(self.latents) - 1, 0, -1):
            mean, std = self.generate(layer, samples[layer])
            bits = bits - torch.distributions.Normal(mean, std).log_prob(samples[layer - 1]).sum(1)
        data = nn.functional.cross_entropy(self.logits(samples[0]).transpose(1, 2), x, reduction="none")
        return (bits + data.sum(1)) / math.log(2)


@pytest.mark.parametrize("latents", [(8,), (8, 4)])
def test_net_rate_of_pictures_is_minus_elbo(latents):
    data = digits()
    train, held_out = ((images.flatten(1).double() * (16 / 255)).round().long() for images in data[::2])
    torch.manual_seed(0)
    model = PixelVAE(latents)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(800):
        loss = model.rate(train[torch.randint(len(train), (64,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = model.double().eval().requires_grad_(False)
    minus_elbo = torch.stack([model.rate(held_out).mean() for _ in range(30)]).mean().item()
    counts = nn.functional.one_hot(train, LEVELS).sum(0).double() + 0.5
    frequencies = counts / counts.sum(1, keepdim=True)
    static = -frequencies.log2()[torch.arange(64), held_out].sum(1).mean().item()
    assert minus_elbo < 0.95 * static < static < 64 * math.log2(LEVELS)
    coder = BitsBackCoder(model, 50)
    coded = coder.encode(held_out)
    assert coded.net_bits / len(held_out) == pytest.approx(minus_elbo, rel=0.01)
    assert torch.equal(coder.decode(coded.words, len(held_out)), held_out)
