"""Images to few bytes: a discrete autoencoder, and models of its codes to write them down by.

Jiang, Cetin and Celiktutan, "IB-DRR", arXiv 2104.10588.

Dimensions: n images, C channels, H height and width, S codes of an image, K values of a code.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.checks import Size, checked
from components.coding.code_models import CategoricalVAE
from components.coding.code_streams import BitsBack, CodeStream, FixedLength, StaticFrequencies
from components.coding.vqvae import DiscreteAutoencoder
from components.files import check_file, is_damage, replacing
from components.networks.states import not_finite

STREAMS = ("fixed", "static", "bits_back")
_CHUNK = 500


@checked
class ImageCodec(nn.Module):
    """An autoencoder of discrete codes, a latent-variable model of them, and their frequencies by place.

    Once frozen it stays in evaluation mode whatever `train()` is called with: a codebook that moves would decode stored
    codes to something else.

    Args:
        image_shape: (C, H, H).
        autoencoder: called with `image_shape`.
        code_model: called with `code_shapes` and `codes`.
        block: images that are coded together by bits back at most.
    """

    def __init__(
        self,
        image_shape: Sequence[Size],
        autoencoder: Callable[..., DiscreteAutoencoder],
        code_model: Callable[..., CategoricalVAE],
        block: Size = 100,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder(image_shape=image_shape)
        self.code_model = code_model(code_shapes=self.autoencoder.code_shapes, codes=self.autoencoder.codes)
        self.block = block
        uniform = torch.full((self.autoencoder.symbols, self.autoencoder.codes), 1 / self.autoencoder.codes)
        self.register_buffer("frequencies", uniform)
        self.frozen = self.frozen_autoencoder = False

    def freeze(self) -> "ImageCodec":
        self.eval().requires_grad_(False)
        self.frozen = self.frozen_autoencoder = True
        return self

    def freeze_autoencoder(self) -> None:
        """Codes are lasting from here on; models of them may still learn."""
        self.autoencoder.eval().requires_grad_(False)
        self.frozen_autoencoder = True

    def train(self, mode: bool = True) -> "ImageCodec":
        super().train(mode and not self.frozen)
        if self.frozen_autoencoder:
            self.autoencoder.eval()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[n, C, H, H] uint8 -> [n, S] int64, on the CPU."""
        assert not self.autoencoder.training
        device = self.frequencies.device
        return torch.cat([self.autoencoder.encode(chunk.to(device)).cpu() for chunk in images.split(_CHUNK)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """[n, S] -> [n, C, H, H] uint8, on the CPU."""
        assert not self.autoencoder.training
        device, make = self.frequencies.device, self.autoencoder
        return torch.cat([make.to_images(make.decode(chunk.to(device))).cpu() for chunk in codes.split(_CHUNK)])

    def stream(self, name: str) -> CodeStream:
        """A way to write codes down: ``fixed``, ``static`` or ``bits_back``."""
        if name == "fixed":
            return FixedLength(self.autoencoder.symbols, self.autoencoder.codes)
        if name == "static":
            return StaticFrequencies(self.frequencies)
        if name == "bits_back":
            return BitsBack(self.code_model, self.block)
        raise ValueError(f"Unknown stream={name!r}: expected one of {', '.join(STREAMS)}.")

    def checksum(self) -> int:
        """Of all that decoding depends on, 32 bits."""
        found = 0
        for name, tensor in sorted(self.state_dict().items()):
            found = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), found))
        return found

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file, atomically."""
        with replacing(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary)

    def load(self, path: str | Path) -> "ImageCodec":
        """Read what `save` wrote, and freeze.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or of a codec of other sizes.
        """
        check_file(Path(path), "a trained codec (`module=image_codec` trains one)", "weights")
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            if not is_damage(error):
                raise
            raise ValueError(f"weights={path}: expected a safetensors file, found a damaged one ({error}).") from error
        own = self.state_dict()
        for name in [*own, *state]:
            shapes = [
                f"{each[name].dtype} {list(each[name].shape)}" if name in each else "nothing" for each in (state, own)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(f"weights={path}: {name} is {shapes[0]}, expected {shapes[1]}.")
        if (name := not_finite(state, own)) is not None:
            raise ValueError(f"weights={path}: {name} is not finite, expected finite weights.")
        self.load_state_dict(state)
        return self.freeze()

    def model_bytes(self) -> dict[str, int]:
        """Bytes of the weights: ``encoder``, ``decode_path`` (decoder, codebooks), ``code_model``, ``frequencies``.

        What only training needs doesn't count. A code model is needed whole: decoding runs its inference too.
        """
        decode_path = ("decoder.", "upsampling.")
        sizes = dict.fromkeys(("encoder", "decode_path", "code_model", "frequencies"), 0)
        for name, tensor in self.state_dict().items():
            part, _, rest = name.partition(".")
            if part != "autoencoder":
                sizes[part] += tensor.nbytes
            elif rest.startswith(decode_path) or rest.endswith("codebook"):
                sizes["decode_path"] += tensor.nbytes
            elif not rest.endswith((".counts", ".sums", ".begun")) and not rest.startswith("entropy."):
                sizes["encoder"] += tensor.nbytes
        return sizes
