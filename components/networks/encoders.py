"""Encoders: from observations to the features that critics and actors share.

Dimensions: N batch, C channels, H height and width of pictures, F features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from components.checks import Count, NonNegative, Size, SizeOrZero, checked, vector_size
from components.networks.ensemble import RELU_GAIN
from components.networks.signal_mixing import SignalMixing


class Encoder(nn.Module, ABC):
    """What an actor-critic agent needs of its encoder, which its critics' loss trains, and a loss of its own if any.

    In training mode an encoder may do what regularises it, such as augmentation; agents act and are evaluated in
    evaluation mode.

    Attributes:
        features: F.
        kept: names of its state that a run which begins from another leaves, as they are settings.
    """

    features: int
    kept: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, observation: Tensor) -> Tensor:
        """[N, *observation_shape] -> [N, F]."""

    def loss(self, observation: Tensor, features: Tensor) -> Tensor | None:
        """A loss [] of the encoder's own, such as that of a reconstruction, which is added to the critics'.

        It has its weight in it; what only this loss trains gets a learning rate of its own from `parameter_groups`.

        Args:
            observation: [N, *observation_shape].
            features: what `forward` made of them, [N, F], with their gradient.
        """
        return None

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What an optimiser is told of the parameters."""
        return [{"params": list(self.parameters()), "lr": learning_rate}]

    def begin(self, data: Any) -> None:
        """Called with the datamodule before training begins or goes on."""

    def stepped(self) -> None:
        """Called after each step of the optimiser."""

    def scores(self) -> dict[str, Tensor]:
        """Numbers to record, by name."""
        return {}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in evaluation mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@checked
class FlatObservations(Encoder):
    """No encoder: observations are vectors, and are the features."""

    def __init__(self, observation_shape: Sequence[Count]) -> None:
        super().__init__()
        self.features = vector_size(observation_shape)

    def forward(self, observation: Tensor) -> Tensor:
        return observation

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return []


@checked
class StandardisedObservations(FlatObservations):
    """Vectors less their mean in the data, over their standard deviation: what offline methods are often given.

    The statistics are taken once, of all the data that are learned from, and are part of the agent from then on: a run
    that begins from another keeps them, for its networks know no other inputs.

    Args:
        eps: added to the standard deviation.
    """

    def __init__(self, observation_shape: Sequence[Count], eps: NonNegative = 1e-3) -> None:
        super().__init__(observation_shape)
        self.eps = eps
        self.register_buffer("mean", torch.zeros(self.features))
        self.register_buffer("scale", torch.ones(self.features))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))

    def begin(self, data: Any) -> None:
        if self.known:
            return
        if not hasattr(data, "observation_statistics"):
            raise ValueError(
                "module/encoder=standardised: expected data that are there before training, as of datamodule=offline, "
                f"found {type(data).__name__}."
            )
        mean, std = data.observation_statistics()
        self.mean.copy_(mean)
        self.scale.copy_(std + self.eps)
        self.known.fill_(True)

    def forward(self, observation: Tensor) -> Tensor:
        return (observation - self.mean) / self.scale


@checked
class PixelEncoder(Encoder):
    """The convolutional encoder of DrQ-v2 (Yarats et al., arXiv 2107.09645): 3x3 convolutions, ReLU after each.

    84 pixels become 41, 39, 37 and 35. Pictures are uint8 until they are here, and mapped to [-1/2, 1/2] behind the
    augmentation. Convolutions work with channels last; features come in the order (channel, row, column).

    Args:
        observation_shape: (C, H, H).
        channels: of every convolution.
        strides: of the convolutions.
        gain: of the orthogonal initialisation.
        augmentation: applied to pictures in training mode, [N, C, H, H] -> the same.
        mixing: makes what is put behind each block, called with the number of blocks; None for nothing.
    """

    def __init__(
        self,
        observation_shape: Sequence[Count],
        channels: Size = 32,
        strides: Sequence[Size] = (2, 1, 1, 1),
        gain: NonNegative = RELU_GAIN,
        augmentation: nn.Module | None = None,
        mixing: Callable[..., SignalMixing] | None = None,
    ) -> None:
        super().__init__()
        if len(observation_shape) != 3 or observation_shape[1] != observation_shape[2]:
            raise ValueError(f"observation_shape={list(observation_shape)}: expected square pictures, [C, H, H].")
        if not strides:
            raise ValueError("strides=[]: expected one for each convolution.")
        # Of a map with less than three rows there is no roughness to measure.
        least = smallest_picture(strides, of=1 if mixing is None else 3)
        if observation_shape[1] < least:
            raise ValueError(f"observation_shape={list(observation_shape)}: expected at least {least} pixels a side.")
        in_channels, size = observation_shape[:2]
        self.convolutions = nn.ModuleList()
        for stride in strides:
            convolution = nn.Conv2d(in_channels, channels, 3, stride)
            nn.init.orthogonal_(convolution.weight, gain)
            nn.init.zeros_(convolution.bias)
            self.convolutions.append(convolution)
            in_channels, size = channels, (size - 3) // stride + 1
        self.convolutions.to(memory_format=torch.channels_last)
        self.feature_shape = (channels, size, size)
        self.features = math.prod(self.feature_shape)
        self.augmentation = augmentation
        self.mixing = None if mixing is None else mixing(blocks=len(strides))
        if self.mixing is not None and not self.mixing.adaptive:
            self.kept = ("mixing.",)

    def forward(self, observation: Tensor) -> Tensor:
        """Pictures [N, C, H, H], uint8 -> [N, F]."""
        if self.augmentation is not None and self.training:
            observation = self.augmentation(observation)
        x = observation.contiguous(memory_format=torch.channels_last).float() / 255 - 0.5
        x = self._mixed(x.to(self.convolutions[0].weight.dtype), 0)
        for block, convolution in enumerate(self.convolutions, 1):
            x = self._mixed(convolution(x).relu(), block)
        return x.flatten(1)

    def _mixed(self, x: Tensor, block: int) -> Tensor:
        return x if self.mixing is None else self.mixing(x, block)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        groups = [{"params": list(self.convolutions.parameters()), "lr": learning_rate}]
        return groups if self.mixing is None else [*groups, *self.mixing.parameter_groups()]

    def stepped(self) -> None:
        if self.mixing is not None:
            self.mixing.stepped()

    def scores(self) -> dict[str, Tensor]:
        return {} if self.mixing is None else self.mixing.scores()


def smallest_picture(strides: Sequence[int], of: int = 1) -> int:
    """Pixels a side of the smallest pictures of which 3x3 convolutions with these strides leave maps of a size."""
    size = of
    for stride in reversed(strides):
        size = (size - 1) * stride + 3
    return size


def random_shift(x: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Crops of pictures whose border is repeated `pad` times outwards.

    Args:
        x: [N, C, H, W], of any type.
        shifts: whole (x, y), [N, 2], of 0 to 2 pad: where the crop's first column and row lie in the padded picture.

    Returns:
        [N, C, H, W], channels last.
    """
    (height, width), device = x.shape[2:], x.device
    rows = (torch.arange(height, device=device) + shifts[:, 1:] - pad).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + shifts[:, :1] - pad).clamp(0, width - 1)
    picture = torch.arange(len(x), device=device)[:, None, None]
    return x.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@checked
class RandomShift(nn.Module):
    """The augmentation of DrQ: each picture is shifted by up to `pad` pixels along each axis.

    Args:
        pad: 4 for pictures of 84 pixels.
    """

    def __init__(self, pad: SizeOrZero = 4) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.randint(0, 2 * self.pad + 1, (len(x), 2), device=x.device)
        return random_shift(x, shifts, self.pad)


@checked
class FeatureTrunk(nn.Sequential):
    """Linear, layer normalisation, tanh: [N, F] -> [N, feature_dim], what DrQ-v2's actor and critic each begin with.

    Attributes:
        out_features: feature_dim.
    """

    def __init__(self, in_features: Count, feature_dim: Size = 50) -> None:
        linear = nn.Linear(in_features, feature_dim)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        super().__init__(linear, nn.LayerNorm(feature_dim), nn.Tanh())
        self.out_features = feature_dim
