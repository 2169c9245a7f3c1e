from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from components.networks.encoders import (
    FeatureTrunk,
    FlatObservations,
    PixelEncoder,
    RandomShift,
    StandardisedObservations,
    evaluating,
    random_shift,
)
from components.networks.ensemble import RELU_GAIN
from components.networks.signal_mixing import SignalMixing


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_sizes_of_the_published_encoder():
    encoder = PixelEncoder((9, 84, 84), mixing=SignalMixing)
    assert encoder.features == 39_200
    assert encoder.feature_shape == (32, 35, 35)
    assert encoder(pictures(2, 9, 84, 84)).shape == (2, 39_200)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in encoder.convolutions]
    assert sizes == [2_624, 9_248, 9_248, 9_248]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 30_368 + 1
    assert PixelEncoder((4, 84, 84), strides=(2, 1, 1)).features == 43_808  # of Atari agents


def test_encoder_is_these_operations():
    encoder, seen = PixelEncoder((9, 20, 20), channels=5), pictures(3, 9, 20, 20)
    x = seen.float() / 255 - 0.5
    for layer, stride in zip(encoder.convolutions, (2, 1, 1, 1)):
        x = nn.functional.conv2d(x, layer.weight, layer.bias, stride).relu()
        flat = layer.weight.flatten(1)
        torch.testing.assert_close(flat @ flat.T, RELU_GAIN**2 * torch.eye(5), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    torch.testing.assert_close(encoder(seen), x.reshape(3, -1), atol=1e-5, rtol=1e-5)  # channel, row, column


def test_regularisers_are_for_training_only():
    torch.manual_seed(0)
    seen = pictures(3, 9, 20, 20)
    plain = PixelEncoder((9, 20, 20), channels=5)
    regularised = PixelEncoder((9, 20, 20), channels=5, augmentation=RandomShift(2), mixing=SignalMixing)
    regularised.convolutions.load_state_dict(plain.convolutions.state_dict())
    assert not torch.equal(regularised(seen), plain(seen))
    with evaluating(regularised):
        assert torch.equal(regularised(seen), plain(seen))
    assert regularised.training
    assert regularised.mixing.layer.training


def test_optimisers_are_told_of_the_strength_separately():
    encoder = PixelEncoder((9, 20, 20), mixing=partial(SignalMixing, learning_rate=0.1, momentum=0.4))
    convolutions, strength = encoder.parameter_groups(1e-3)
    assert (convolutions["lr"], len(convolutions["params"])) == (1e-3, 8)
    assert (strength["lr"], strength["betas"]) == (0.1, (0.4, 0.999))
    assert len(PixelEncoder((9, 20, 20)).parameter_groups(1e-3)) == 1
    assert PixelEncoder((9, 20, 20)).scores() == {}


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_random_shift_crops_the_padded_picture(kind):
    x = pictures(6, 3, 9, 9).to(kind)
    padded = nn.functional.pad(x.float(), (2,) * 4, mode="replicate").to(kind)
    shifts = torch.tensor([[0, 0], [4, 4], [2, 2], [1, 3], [4, 0], [0, 2]])
    for crop, whole, (column, row) in zip(random_shift(x, shifts, 2), padded, shifts.tolist()):
        assert torch.equal(crop, whole[:, row : row + 9, column : column + 9])
    assert torch.equal(random_shift(x, torch.full((6, 2), 2), 2), x)


def test_random_shifts_are_independent_and_uniform():
    torch.manual_seed(0)
    x = torch.stack(torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")).expand(4000, 2, 9, 9)
    shifted = RandomShift(2)(x)[:, :, 4, 4] - 4
    counts = torch.stack([(shifted == step).float().mean(0) for step in range(-2, 3)])
    torch.testing.assert_close(counts, torch.full((5, 2), 0.2), atol=0.03, rtol=0)
    assert abs(torch.corrcoef(shifted.T.float())[0, 1]) < 0.06


def test_trunk():
    trunk = FeatureTrunk(30, 6)
    assert trunk.out_features == 6
    torch.testing.assert_close(trunk[0].weight @ trunk[0].weight.T, torch.eye(6), atol=1e-5, rtol=0)
    x = torch.randn(4, 30)
    expected = torch.tanh(nn.functional.layer_norm(x @ trunk[0].weight.T, (6,)))
    torch.testing.assert_close(trunk(x), expected)


def test_encoder_in_double_precision_is_that_in_single():
    outs = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        encoder = PixelEncoder((9, 20, 20), channels=4, mixing=SignalMixing, augmentation=RandomShift(2)).to(dtype)
        outs.append(encoder(pictures(8, 9, 20, 20)))
    assert outs[1].dtype == torch.float64
    torch.testing.assert_close(outs[1].float(), outs[0], rtol=1e-4, atol=1e-4)


def test_encoder_in_half_precision_and_compiled_scores_in_float32():
    torch.manual_seed(0)
    encoder, seen = (
        PixelEncoder((9, 20, 20), channels=4, mixing=partial(SignalMixing, initial=0.0)),
        pictures(8, 9, 20, 20),
    )
    weights = torch.randn(encoder.features)

    def gradient(forward):
        return torch.autograd.grad((forward(seen).float() * weights).sum(), encoder.mixing.duals[0].strength)[0]

    expected = gradient(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(seen).dtype == torch.bfloat16
        half = gradient(encoder)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected.item(), abs=0.01)
    assert gradient(torch.compile(encoder, backend="aot_eager_decomp_partition")).item() == pytest.approx(
        expected.item(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlatObservations((9, 84, 84)), r"observation_shape=\[9, 84, 84\]: expected vectors"),
        (lambda: PixelEncoder((5,)), r"observation_shape=\[5\]: expected square pictures"),
        (lambda: PixelEncoder((9, 84, 80)), r"observation_shape=\[9, 84, 80\]: expected square pictures"),
        (lambda: PixelEncoder((9, 12, 12)), r"observation_shape=\[9, 12, 12\]: expected at least 15 pixels a side"),
        (
            lambda: PixelEncoder((9, 18, 18), mixing=SignalMixing),  # maps of two rows have no roughness to measure
            r"observation_shape=\[9, 18, 18\]: expected at least 19 pixels a side",
        ),
        (lambda: PixelEncoder((9, 20, 20), strides=[]), r"strides=\[\]: expected one for each convolution"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_standardised_observations_are_those_of_the_data_once():
    encoder, x = StandardisedObservations([2], eps=1e-3), torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert torch.equal(encoder(x), x)
    data = SimpleNamespace(observation_statistics=lambda: (x.double().mean(0), x.double().std(0, correction=0)))
    encoder.begin(data)
    expected = torch.tensor([[-1 / 1.001, 0.0], [1 / 1.001, 0.0]])
    torch.testing.assert_close(encoder(x), expected)
    encoder.begin(SimpleNamespace(observation_statistics=lambda: (torch.ones(2), torch.ones(2))))
    torch.testing.assert_close(encoder(x), expected)
    other = StandardisedObservations([2])
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(other(x), expected)
    with pytest.raises(ValueError, match=r"^module/encoder=standardised: expected data that are there before training"):
        StandardisedObservations([2]).begin(SimpleNamespace())
