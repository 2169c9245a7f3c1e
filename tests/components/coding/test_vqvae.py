import copy
from functools import partial

import pytest
import torch

from components.coding.code_models import CategoricalVAE
from components.coding.image_codec import ImageCodec
from components.coding.vqvae import VQVAE, DiscreteAutoencoder, HierarchicalVQVAE


def images(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def small(two_levels: bool, size: int = 28) -> DiscreteAutoencoder:
    torch.manual_seed(0)
    sizes = {"codes": 10, "dim": 4, "width": 8, "blocks": 1, "block_width": 4}
    return HierarchicalVQVAE((1, size, size), **sizes) if two_levels else VQVAE((1, size, size), **sizes)


def test_sizes_are_those_of_published_code():
    made = HierarchicalVQVAE((3, 32, 32))
    assert made.code_shapes == ((4, 4), (8, 8))
    assert made.symbols == 80
    assert sum(parameter.numel() for parameter in made.parameters()) == 1_388_867
    decoding = [p for name, p in made.named_parameters() if name.startswith(("upsampling.", "decoder."))]
    assert sum(parameter.numel() for parameter in decoding) == 429_635
    assert sum(quantizer.codebook.numel() for quantizer in made.quantizers()) == 65_536


@pytest.mark.parametrize(("size", "halvings", "side"), [(28, 1, 14), (28, 2, 7), (30, 2, 8), (8, 1, 4), (32, 3, 4)])
def test_one_level(size, halvings, side):
    made = VQVAE((2, size, size), codes=7, dim=3, width=8, blocks=1, block_width=4, halvings=halvings).eval()
    assert made.code_shapes == ((side, side),)
    out = made(images(3, 2, size))
    assert out.images.shape == (3, 2, size, size)
    assert out.codes.shape == (3, side * side)


@pytest.mark.parametrize("two_levels", [False, True])
def test_decoding_what_was_encoded_is_the_reconstruction_to_the_bit(two_levels):
    made = small(two_levels)
    made(images(32, 1, 28))
    made.eval()
    x = images(5, 1, 28, seed=1)
    out = made(x)
    assert torch.equal(made.encode(x), out.codes)
    assert torch.equal(made.decode(out.codes), out.images)
    assert made.to_images(out.images).dtype == torch.uint8


@pytest.mark.parametrize("two_levels", [False, True])
def test_double_precision_does_what_single_does(two_levels):
    single = small(two_levels)
    single(images(32, 1, 28))
    double = copy.deepcopy(single.eval()).double()
    outs = [made(images(4, 1, 28)) for made in (single, double)]
    assert torch.equal(outs[1].codes, outs[0].codes)
    torch.testing.assert_close(outs[1].images.float(), outs[0].images, rtol=1e-4, atol=1e-5)
    assert torch.equal(double.decode(outs[1].codes), outs[1].images)


def test_codes_are_the_top_level_then_the_bottom_one_row_by_row():
    made = small(two_levels=True, size=32).eval()
    x = images(2, 1, 32)
    maps, _, (top, bottom) = made._quantise(made._padded(x))
    assert torch.equal(made.encode(x), torch.cat([top.flatten(1), bottom.flatten(1)], 1))
    assert [level.shape for level in (top, bottom)] == [(2, 4, 4), (2, 8, 8)]
    assert [level.shape for level in maps] == [(2, 4, 4, 4), (2, 4, 8, 8)]


def test_the_bottom_level_sees_the_top_one_and_not_the_other_way():
    made = small(two_levels=True).eval()
    x = images(8, 1, 28)
    before = made.encode(x)
    with torch.no_grad():
        for parameter in made.top_decoder.parameters():
            parameter.zero_()
    after = made.encode(x)
    assert torch.equal(after[:, :16], before[:, :16])
    assert not torch.equal(after[:, 16:], before[:, 16:])
    with torch.no_grad():
        made.bottom_projection.weight.zero_()
    assert torch.equal(made.encode(x)[:, :16], before[:, :16])


def test_images_go_through_the_scale_and_back():
    made = small(two_levels=False)
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(made.to_images(made.scaled(x)), x)
    assert made.to_images(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_images_that_are_not_square_are_named():
    with pytest.raises(ValueError, match=r"image_shape=.*expected square images"):
        VQVAE((1, 8, 9))
    with pytest.raises(ValueError, match=r"Images of shape \[1, 16, 16\]: expected \[1, 8, 8\]"):
        VQVAE((1, 8, 8), width=8).encode(images(2, 1, 16))
    with pytest.raises(ValueError, match="width=1: expected one that can be halved as often as the size, 2 times"):
        VQVAE((1, 8, 8), width=1)


def codec(seed: int = 0, width: int = 8) -> ImageCodec:
    torch.manual_seed(seed)
    make = partial(VQVAE, codes=10, dim=4, width=width, blocks=1, block_width=4)
    made = ImageCodec((1, 8, 8), make, partial(CategoricalVAE, width=8, latent_channels=1, embedding=4), block=4)
    made.autoencoder(images(16, 1, 8))
    return made


def test_frozen_codecs_stay_as_they_are():
    made = codec().freeze()
    x = images(9, 1, 8, seed=2)
    codes, checksum = made.encode(x), made.checksum()
    made.train()
    made.autoencoder(x)
    assert not any(module.training for module in made.modules())
    assert made.checksum() == checksum
    assert torch.equal(made.encode(x), codes)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert made.decode(codes).shape == x.shape
    assert made.decode(codes[:0]).shape == (0, 1, 8, 8)


def test_codecs_are_saved_and_loaded(tmp_path):
    made = codec().freeze()
    made.save(tmp_path / "codec.safetensors")
    other = codec(seed=1).load(tmp_path / "codec.safetensors")
    x = images(9, 1, 8, seed=2)
    assert other.frozen
    assert other.checksum() == made.checksum() != codec(seed=1).checksum()
    assert torch.equal(other.encode(x), made.encode(x))
    counted = sum(made.model_bytes().values())
    training_only = sum(
        value.nbytes for name, value in made.state_dict().items() if name.endswith((".counts", ".sums", ".begun"))
    )
    assert counted + training_only == sum(value.nbytes for value in made.state_dict().values())
    with pytest.raises(ValueError, match=r"weights=.*expected torch.float32 \["):
        codec(width=16).load(tmp_path / "codec.safetensors")
    odd = codec()
    odd.autoencoder.encoder[0].bias.data[0] = torch.nan
    odd.save(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"weights=.*: autoencoder\.encoder\.0\.bias is not finite, expected finite"):
        codec().load(tmp_path / "odd.safetensors")
    whole = (tmp_path / "codec.safetensors").read_bytes()
    (tmp_path / "codec.safetensors").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"weights=.*found a damaged one"):
        codec().load(tmp_path / "codec.safetensors")
    with pytest.raises(FileNotFoundError, match=r"weights=.*expected a trained codec .*, found none"):
        codec().load(tmp_path / "nothing")
