"""A learned transform codec as the comparator of discrete autoencoders (Balle et al., arXiv 1611.01704).

Dimensions: B images, C channels, H height and width, S symbols of an image, M latent channels.
"""

from collections.abc import Sequence

from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN
from torch import Tensor, nn

from components.checks import Size, checked
from components.coding.vector_quantizer import VectorQuantizer
from components.coding.vqvae import DiscreteAutoencoder


@checked
class TransformCodec(DiscreteAutoencoder):
    """Two strided convolutions with divisive normalisation, whose outputs are rounded to whole numbers.

    In training rounding is noise, and `commitment` is the rate that compressai's factorised entropy model gives, in
    kilobits of an image. The numbers, cut off at +- `bound`, are written down as codes are: compressai's own coder
    would flush four bytes for each image.

    Args:
        image_shape: (C, H, H).
        width: channels.
        latent_channels: M.
        bound: the largest number.
    """

    def __init__(
        self, image_shape: Sequence[Size], width: Size = 32, latent_channels: Size = 8, bound: Size = 15
    ) -> None:
        super().__init__(image_shape, 4)
        channels, side = image_shape[0], self._size // 4
        self.bound = bound
        self.codes = 2 * bound + 1
        self.latent_shape = (latent_channels, side, side)
        self.code_shapes = ((latent_channels * side, side),)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 5, 2, 2), GDN(width), nn.Conv2d(width, latent_channels, 5, 2, 2)
        )
        self.entropy = EntropyBottleneck(latent_channels)
        self.entropy.quantiles.requires_grad_(False)  # which only its own coder needs
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent_channels, width, 5, 2, 2, 1),
            GDN(width, inverse=True),
            nn.ConvTranspose2d(width, channels, 5, 2, 2, 1),
        )

    def quantizers(self) -> list[VectorQuantizer]:
        return []

    def decode(self, codes: Tensor) -> Tensor:
        values = (codes - self.bound).to(self.decoder[0].weight.dtype)
        return self._cropped(self._decode([values.view(-1, *self.latent_shape)]))

    def _quantise(self, x: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        y = self.encoder(x)
        whole = y.round().clamp(-self.bound, self.bound)
        values, likelihood = self.entropy(y)
        kilobits = -likelihood.log2().sum() / len(x) / 1000
        return [values if self.training else whole], kilobits, [(whole + self.bound).long()]

    def _decode(self, maps: list[Tensor]) -> Tensor:
        return self.decoder(maps[0])
