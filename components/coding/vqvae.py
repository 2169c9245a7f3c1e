"""Images to discrete codes and back: VQ-VAE with one level of codes, VQ-VAE-2 with two.

Van den Oord et al., arXiv 1711.00937; Razavi et al., arXiv 1906.00446, in the sizes of published small-image code.

Dimensions: B images, C channels, H height and width, S codes of an image, D a code vector's size, K codes.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from components.checks import Range, Size, checked
from components.coding.vector_quantizer import Codes, VectorQuantizer


class Reconstruction(NamedTuple):
    """What an autoencoder makes of images.

    Attributes:
        images: [B, C, H, H], from -1 for black to 1, not clamped.
        commitment: scalar, mean squared distance of what was encoded to its codes, summed over levels.
        codes: [B, S], int64.
    """

    images: Tensor
    commitment: Tensor
    codes: Tensor


@checked
class DiscreteAutoencoder(nn.Module, ABC):
    """Square uint8 images to codes and back. Black borders are added where the size is no multiple of what is needed.

    Args:
        image_shape: (C, H, H).
        multiple: of which the padded size has to be.

    Attributes:
        code_shapes: height and width of each level's map of codes, the coarsest first; in this order, row by row, they
            stand in an image's codes.
        codes: K, of every level.
    """

    code_shapes: tuple[tuple[int, int], ...]
    codes: int

    def __init__(self, image_shape: Sequence[Size], multiple: Size) -> None:
        super().__init__()
        if len(image_shape) != 3 or image_shape[1] != image_shape[2]:
            raise ValueError(f"image_shape={list(image_shape)}: expected square images, [C, H, H].")
        self.image_shape = tuple(image_shape)
        missing = -image_shape[1] % multiple
        self._border = (missing // 2, missing - missing // 2)
        self._size = image_shape[1] + missing

    @property
    def symbols(self) -> int:
        """S."""
        return sum(height * width for height, width in self.code_shapes)

    def forward(self, images: Tensor) -> Reconstruction:
        """Images [B, C, H, H], uint8."""
        maps, commitment, index = self._quantise(self._padded(images))
        return Reconstruction(self._cropped(self._decode(maps)), commitment, _flat(index))

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, H, H] uint8 -> [B, S] int64; only in evaluation mode do images have lasting codes."""
        return _flat(self._quantise(self._padded(images))[2])

    def decode(self, codes: Tensor) -> Tensor:
        """[B, S] -> [B, C, H, H], from -1 to 1, not clamped."""
        parts = codes.split([height * width for height, width in self.code_shapes], dim=1)
        maps = [
            quantizer.look_up(part.view(-1, *shape)).permute(0, 3, 1, 2)
            for quantizer, part, shape in zip(self.quantizers(), parts, self.code_shapes)
        ]
        return self._cropped(self._decode(maps))

    def to_images(self, decoded: Tensor) -> Tensor:
        """What `forward` and `decode` give as uint8."""
        return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def scaled(self, images: Tensor) -> Tensor:
        """uint8 as -1 for black to 1."""
        return images.float() / 127.5 - 1

    def _padded(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"Images of shape {list(images.shape[1:])}: expected {list(self.image_shape)}.")
        scaled = self.scaled(images).to(next(self.parameters()).dtype)
        return nn.functional.pad(scaled, self._border * 2, value=-1.0)

    def _cropped(self, x: Tensor) -> Tensor:
        begin, size = self._border[0], self.image_shape[1]
        return x[..., begin : begin + size, begin : begin + size]

    @abstractmethod
    def quantizers(self) -> list[VectorQuantizer]:
        """Of each level."""

    @abstractmethod
    def _quantise(self, x: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Each level's map of code vectors [B, D, h, w], the commitment, and each level's codes [B, h, w]."""

    @abstractmethod
    def _decode(self, maps: list[Tensor]) -> Tensor:
        """Code vectors of each level to padded images."""


@checked
class VQVAE(DiscreteAutoencoder):
    """One level of codes.

    Args:
        image_shape: (C, H, H).
        codes: K.
        dim: D.
        width: channels.
        blocks: residual blocks at each end.
        block_width: channels inside of them.
        halvings: how often the size is halved.
        quantizer: further arguments of `VectorQuantizer`.
    """

    def __init__(
        self,
        image_shape: Sequence[Size],
        codes: Codes = 512,
        dim: Size = 64,
        width: Size = 128,
        blocks: Size = 2,
        block_width: Size = 32,
        halvings: Annotated[int, Range(1, 16)] = 2,
        **quantizer: float,
    ) -> None:
        super().__init__(image_shape, 2**halvings)
        self.codes = codes
        side = self._size // 2**halvings
        self.code_shapes = ((side, side),)
        self.encoder = _encoder(image_shape[0], width, halvings, blocks, block_width)
        self.projection = nn.Conv2d(width, dim, 1)
        self.quantizer = VectorQuantizer(dim, codes, **quantizer)
        self.decoder = _decoder(dim, width, image_shape[0], halvings, blocks, block_width)

    def quantizers(self) -> list[VectorQuantizer]:
        return [self.quantizer]

    def _quantise(self, x: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        values, commitment, index = _quantise(self.quantizer, self.projection(self.encoder(x)))
        return [values], commitment, [index]

    def _decode(self, maps: list[Tensor]) -> Tensor:
        return self.decoder(maps[0])


@checked
class HierarchicalVQVAE(DiscreteAutoencoder):
    """Two levels of codes: a top one of an eighth of the size, and a bottom one of a quarter, encoded in its light.

    Arguments as those of `VQVAE`, and the defaults those of published code for images of 32 pixels.
    """

    def __init__(
        self,
        image_shape: Sequence[Size],
        codes: Codes = 512,
        dim: Size = 64,
        width: Size = 128,
        blocks: Size = 2,
        block_width: Size = 32,
        **quantizer: float,
    ) -> None:
        super().__init__(image_shape, 8)
        self.codes = codes
        self.code_shapes = ((self._size // 8,) * 2, (self._size // 4,) * 2)
        self.bottom_encoder = _encoder(image_shape[0], width, 2, blocks, block_width)
        self.top_encoder = _encoder(width, width, 1, blocks, block_width)
        self.top_projection = nn.Conv2d(width, dim, 1)
        self.top_quantizer = VectorQuantizer(dim, codes, **quantizer)
        self.top_decoder = _decoder(dim, width, dim, 1, blocks, block_width)
        self.bottom_projection = nn.Conv2d(dim + width, dim, 1)
        self.bottom_quantizer = VectorQuantizer(dim, codes, **quantizer)
        self.upsampling = nn.ConvTranspose2d(dim, dim, 4, 2, 1)
        self.decoder = _decoder(2 * dim, width, image_shape[0], 2, blocks, block_width)

    def quantizers(self) -> list[VectorQuantizer]:
        return [self.top_quantizer, self.bottom_quantizer]

    def _quantise(self, x: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        bottom = self.bottom_encoder(x)
        top_values, top_commitment, top = _quantise(self.top_quantizer, self.top_projection(self.top_encoder(bottom)))
        bottom = self.bottom_projection(torch.cat([self.top_decoder(top_values), bottom], 1))
        values, commitment, index = _quantise(self.bottom_quantizer, bottom)
        return [top_values, values], top_commitment + commitment, [top, index]

    def _decode(self, maps: list[Tensor]) -> Tensor:
        top, bottom = maps
        return self.decoder(torch.cat([self.upsampling(top), bottom], 1))


class ResidualBlock(nn.Module):
    """x + conv 1x1 (ReLU (conv 3x3 (ReLU (x)))), [B, width, h, w] -> the same."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        # Not in place: that would rectify the branch that goes past them too.
        self.branch = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _encoder(in_channels: int, width: int, halvings: int, blocks: int, block_width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = [in_channels, *(width // 2 ** (halvings - step) for step in range(1, halvings)), width]
    if halvings == 1:
        channels = [in_channels, width // 2]
    if min(channels) < 1:
        raise ValueError(f"width={width}: expected one that can be halved as often as the size, {halvings} times.")
    for inside, outside in itertools.pairwise(channels):
        layers += [nn.Conv2d(inside, outside, 4, 2, 1), nn.ReLU()]
    layers.append(nn.Conv2d(channels[-1], width, 3, padding=1))
    layers += [ResidualBlock(width, block_width) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.ReLU())


def _decoder(
    in_channels: int, width: int, out_channels: int, doublings: int, blocks: int, block_width: int
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
    layers += [ResidualBlock(width, block_width) for _ in range(blocks)]
    layers.append(nn.ReLU())
    for step in range(1, doublings):
        layers += [nn.ConvTranspose2d(width // 2 ** (step - 1), width // 2**step, 4, 2, 1), nn.ReLU()]
    layers.append(nn.ConvTranspose2d(width // 2 ** (doublings - 1), out_channels, 4, 2, 1))
    return nn.Sequential(*layers)


def _quantise(quantizer: VectorQuantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, index, commitment = quantizer(x.permute(0, 2, 3, 1))
    return values.permute(0, 3, 1, 2), commitment, index


def _flat(index: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten(1) for level in index], 1)
