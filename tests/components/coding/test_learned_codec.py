import pytest
import torch

from components.coding.learned_codec import TransformCodec


def made(size: int = 28) -> TransformCodec:
    torch.manual_seed(0)
    return TransformCodec((1, size, size), width=8, latent_channels=3, bound=4)


def images(count: int = 6, size: int = 28) -> torch.Tensor:
    return torch.randint(256, (count, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("size", [8, 28, 30])
def test_numbers_are_whole_and_decode_to_the_reconstruction(size):
    codec = made(size).eval()
    out = codec(images(size=size))
    assert out.images.shape == (6, 1, size, size)
    assert out.codes.shape == (6, codec.symbols)
    assert out.codes.min() >= 0
    assert out.codes.max() < codec.codes == 9
    assert torch.equal(codec.encode(images(size=size)), out.codes)
    assert torch.equal(codec.decode(out.codes), out.images)
    torch.testing.assert_close(codec.double().decode(out.codes).float(), out.images, rtol=1e-4, atol=1e-5)
    assert torch.equal(codec.encode(images(size=size)), out.codes)


def test_training_adds_noise_and_counts_bits():
    codec = made()
    first, second = codec(images()), codec(images())
    assert not torch.equal(first.images, second.images)
    assert first.commitment > 0
    gradients = torch.autograd.grad(
        first.images.square().mean() + first.commitment, [p for p in codec.parameters() if p.requires_grad]
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_price_on_bits_makes_fewer_of_them():
    rates = []
    for price in (0.0, 1.0):
        codec = made(8)
        optimizer = torch.optim.Adam([p for p in codec.parameters() if p.requires_grad], 1e-2)
        for _ in range(60):
            out = codec(images(32, 8))
            loss = (out.images - codec.scaled(images(32, 8))).square().mean() + price * out.commitment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates.append(codec.eval()(images(32, 8)).commitment.item())
    assert rates[1] < 0.7 * rates[0]
