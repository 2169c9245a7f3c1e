"""Small networks from images to features, for classifiers that learn one class after the other.

Dimensions: B images, C channels, H height and width, F features.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from components.checks import Size, SizeOrZero, checked


@checked
class SmallConvNet(nn.Sequential):
    """Convolutions 3x3 with ReLU, each followed by a pooling by two, and one dense layer; no normalisation.

    Args:
        image_shape: (C, H, H).
        channels: of the convolutions.
        features: F.
    """

    def __init__(self, image_shape: Sequence[Size], channels: Sequence[Size] = (16, 32), features: Size = 64) -> None:
        if not channels:
            raise ValueError("channels=[]: expected a number for each convolution.")
        size = image_shape[1]
        layers: list[nn.Module] = []
        for inside, outside in pairwise([image_shape[0], *channels]):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            size = -(-size // 2)
        layers += [nn.Flatten(), nn.Linear(channels[-1] * size**2, features), nn.ReLU()]
        super().__init__(*layers)
        self.features = features


@checked
class ResNet(nn.Module):
    """The residual network for images of 32 pixels (He et al., arXiv 1512.03385): 6 n + 2 layers, F = 64.

    Args:
        image_shape: (C, H, H).
        depth: n; 5 makes ResNet-32.
    """

    features = 64

    def __init__(self, image_shape: Sequence[Size], depth: Size = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
        inside = 16
        for outside in (16, 32, 64):
            for index in range(depth):
                layers.append(_Block(inside, outside, 2 if index == 0 and outside > 16 else 1))
                inside = outside
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, H] -> [B, F]."""
        return self.layers(x).mean((2, 3))


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.stride, self.missing = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        # Where sizes change, the other branch takes every second pixel and fills new channels with zeros.
        past = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))
        return (past + self.branch(x)).relu()


@checked
class CropAndFlip(nn.Module):
    """Each image of a batch is shifted by up to `pad` pixels over a black border, and mirrored half of the time.

    Args:
        pad: pixels.
    """

    def __init__(self, pad: SizeOrZero = 4) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, H], of any type -> the same."""
        count, _, height, width = images.shape
        device = images.device
        padded = nn.functional.pad(images, (self.pad,) * 4)
        shifts = torch.randint(0, 2 * self.pad + 1, (count, 2), device=device)
        mirrored = torch.rand(count, 1, device=device) < 0.5
        rows = torch.arange(height, device=device) + shifts[:, 1:]
        columns = torch.arange(width, device=device).expand(count, -1)
        columns = torch.where(mirrored, columns.flip(1), columns) + shifts[:, :1]
        image = torch.arange(count, device=device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
