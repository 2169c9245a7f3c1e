import math

import pytest
import torch
from torch import nn

from components.networks.signal_mixing import (
    PLACES,
    DualStrength,
    LocalSignalMixing,
    SignalMixing,
    discontinuity_score,
    translate,
)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas(rows: int, scale: float = 2.5, seed: int = 1) -> torch.Tensor:
    return scale * (2 * torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) - 1)


def ramp(size: int, along: str) -> torch.Tensor:
    values = torch.arange(size).float().expand(size, size)
    return (values if along == "x" else values.T)[None, None]


# -- the translation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", ["x", "y"])
def test_ramps_rise_by_the_translation(along):
    for delta in deltas(5):
        moved = translate(ramp(12, along), delta[None]) - ramp(12, along)
        expected = delta[0 if along == "x" else 1].expand(6, 6)
        torch.testing.assert_close(moved[0, 0, 3:-3, 3:-3], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "tolerance"), [(7, 2e-6), (35, 3e-5)])
@pytest.mark.parametrize("rows", [1, 4])
def test_translation_is_border_clamped_bilinear_sampling(size, tolerance, rows):
    z, delta = maps(4, 3, size, size), deltas(rows)
    place = torch.arange(size)
    x, y = ((2 * (place + shift[:, None]) / (size - 1) - 1) for shift in delta.unbind(1))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1).expand(4, size, size, 2)
    expected = nn.functional.grid_sample(z, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(translate(z, delta), expected, atol=tolerance, rtol=0)


def test_translation_by_brute_force():
    """The formula read aloud: the four pixels around the clamped place, weighted by nearness."""
    z, (x, y) = maps(1, 1, 5, 4)[0, 0], (1.7, -0.4)
    moved = translate(z[None, None], torch.tensor([[x, y]]))[0, 0]
    for i in range(5):
        for j in range(4):
            row, column = min(max(i + y, 0), 4), min(max(j + x, 0), 3)
            value = sum(
                max(0, 1 - abs(row - r)) * max(0, 1 - abs(column - c)) * z[r, c].item()
                for r in range(5)
                for c in range(4)
            )
            assert moved[i, j].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_maps_keep_their_precision(dtype, tolerance):
    z, delta = maps(2, 3, 9, 9), deltas(2)
    moved = translate(z.to(dtype), delta)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved.float(), translate(z, delta), atol=tolerance, rtol=0)


@pytest.mark.parametrize("rows", [1, 4])
def test_translated_maps_keep_range_and_constants_and_gradients_their_sum(rows):
    z = maps(4, 3, 9, 9).requires_grad_()
    moved = translate(z, deltas(rows))
    assert (moved.amax((2, 3)) <= z.amax((2, 3)) + 1e-6).all()
    assert (moved.amin((2, 3)) >= z.amin((2, 3)) - 1e-6).all()
    torch.testing.assert_close(translate(torch.full((1, 1, 9, 9), 3.0), deltas(1)), torch.full((1, 1, 9, 9), 3.0))
    gradient = maps(4, 3, 9, 9, seed=2)
    (back,) = torch.autograd.grad(moved, z, gradient)
    torch.testing.assert_close(back.sum((2, 3)), gradient.sum((2, 3)), atol=1e-4, rtol=1e-5)
    # <LIX z, g> = <z, LIX^T g>
    torch.testing.assert_close((moved * gradient).sum(), (z * back).sum(), rtol=1e-5, atol=1e-5)


def test_whole_pixels_are_moved_exactly():
    z = maps(2, 3, 8, 8)
    moved = translate(z, torch.tensor([[2.0, -1.0]]))
    assert torch.equal(moved[:, :, 1:, :-2], z[:, :, :-1, 2:])
    assert torch.equal(translate(z, torch.zeros(1, 2)), z)
    assert translate(z, deltas(1)).is_contiguous(memory_format=torch.channels_last)


# -- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("u", "strength", "moved"), [(1.0, 1.0, 2.5), (0.0, 1.0, -2.5), (0.5, 0.7, 0.0), (1.0, 0.4, 1.0)]
)
def test_radius_is_pad_and_a_half_times_strength(monkeypatch, u, strength, moved):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, u))
    rise = LocalSignalMixing(pad=2)(ramp(12, "x"), strength) - ramp(12, "x")
    torch.testing.assert_close(rise[0, 0, 3:-3, 3:-3], torch.full((6, 6), moved), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_one_translation_for_all_samples_and_channels_or_one_for_each(shared):
    torch.manual_seed(0)
    layer, z = LocalSignalMixing(2, shared_across_batch=shared), ramp(12, "x").expand(6, 3, 12, 12)
    moved = (layer(z, 1.0) - z)[:, :, 5, 5]
    assert moved.std(1).max() < 1e-6
    assert (moved.std(0).max() < 1e-6) == shared
    assert (layer(z, 1.0) - z)[0, 0, 5, 5] != moved[0, 0]  # each call draws its own


def test_translations_are_uniform_over_their_square():
    torch.manual_seed(0)
    layer, z = LocalSignalMixing(2), torch.cat([ramp(12, "x"), ramp(12, "y")], 1)
    moved = torch.stack([(layer(z, 0.8) - z)[0, :, 5, 5] for _ in range(2000)])
    assert moved.abs().max() <= 2.0 + 1e-5
    torch.testing.assert_close(moved.var(0), torch.full((2,), 4 / 3), atol=0.1, rtol=0)
    assert abs(torch.corrcoef(moved.T)[0, 1]) < 0.08


def test_no_strength_and_evaluation_are_the_identity():
    z, layer = maps(2, 3, 35, 35), LocalSignalMixing(2)
    torch.testing.assert_close(layer(z, 0.0), z, atol=3e-5, rtol=0)
    assert layer.eval()(z, 1.0) is z


def test_no_gradient_flows_to_the_strength():
    strength = torch.tensor(0.5, requires_grad=True)
    moved = LocalSignalMixing(2)(maps(1, 1, 6, 6).requires_grad_(), strength)
    assert torch.autograd.grad(moved.sum(), strength, allow_unused=True) == (None,)


# -- the score ----------------------------------------------------------------------------------------------------


def checkerboard(size: int) -> torch.Tensor:
    place = torch.arange(size)
    return (1.0 - 2.0 * ((place[:, None] + place) % 2))[None, None]


def smoothed_noise(sigma: float) -> torch.Tensor:
    reach = math.ceil(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    noise = maps(64, 1, 35 + 2 * reach, 35 + 2 * reach)
    noise = nn.functional.conv2d(noise, kernel[..., None])
    return nn.functional.conv2d(noise, kernel[:, :, None]).transpose(0, 1)


def test_score_of_known_gradients():
    assert discontinuity_score(torch.full((1, 2, 6, 6), 0.3)) == 0
    for size, expected in ((6, 1.16712), (35, 1.11522)):
        assert discontinuity_score(checkerboard(size)).item() == pytest.approx(expected, abs=1e-5)
    centred = ramp(6, "x") - 2.5
    assert discontinuity_score(centred).item() == pytest.approx(0.286248, abs=1e-5)
    spike = torch.zeros(1, 1, 7, 7)
    spike[..., 3, 3] = 1
    expected = (math.log1p(1e20) + 8 * math.log(2)) / 49
    assert discontinuity_score(spike).item() == pytest.approx(expected, rel=1e-5) == pytest.approx(1.05300, abs=1e-5)
    assert discontinuity_score(torch.cat([spike, -spike])) == 0  # the mean over the batch comes first


def test_score_of_noise_falls_with_its_smoothness():
    assert discontinuity_score(maps(1, 32 * 8, 35, 35)).item() == pytest.approx(1.046, abs=0.003)
    for sigma, expected in ((0.5, 0.954), (0.7, 0.763), (1.0, 0.556), (1.5, 0.380), (2.0, 0.295)):
        assert discontinuity_score(smoothed_noise(sigma)).item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("robust", [True, False])
def test_score_by_brute_force(robust):
    g = maps(2, 1, 4, 4).mean(0)[0]
    terms = []
    for i in range(4):
        for j in range(4):
            around = [
                g[min(max(i + di, 0), 3), min(max(j + dj, 0), 3)].item()
                for di in (-1, 0, 1)
                for dj in (-1, 0, 1)
                if (di, dj) != (0, 0)
            ]
            own = g[i, j].item()
            noise, signal = sum((k - own) ** 2 for k in around) / 8, sum(k**2 for k in around) / 8
            terms.append(math.log1p(noise / signal) if robust else noise / own**2)
    score = discontinuity_score(maps(2, 1, 4, 4), robust=robust)
    assert score.item() == pytest.approx(sum(terms) / 16, rel=1e-4)


def test_score_does_not_depend_on_scale_order_direction_or_copies():
    gradient = 1e-3 * maps(4, 8, 9, 9)
    score = discontinuity_score(gradient)
    others = (
        1e3 * gradient,
        1e-3 * gradient,
        gradient.flip(1),
        gradient.flip(2),
        gradient.flip(3),
        gradient.transpose(2, 3),
        gradient.mean(0, keepdim=True).repeat(5, 1, 1, 1),
        gradient.to(memory_format=torch.channels_last),
    )
    for other in others:
        assert abs(discontinuity_score(other) - score) < 1e-4


def test_score_of_half_precision_is_computed_in_float32():
    gradient = (1e-6 * maps(4, 8, 9, 9)).bfloat16()  # their squares would vanish in half precision
    score = discontinuity_score(gradient)
    assert score.dtype == torch.float32
    assert score == discontinuity_score(gradient.float())


# -- the dual update ----------------------------------------------------------------------------------------------


def test_features_keep_their_gradient_and_the_strength_gets_target_less_score():
    dual, z = DualStrength(0.5, target=0.535), maps(4, 3, 9, 9).requires_grad_()
    out = dual(z)
    assert torch.equal(out, z)
    gradient = maps(4, 3, 9, 9, seed=3)
    back, by_strength = torch.autograd.grad(out, [z, dual.strength], gradient)
    assert torch.equal(back, gradient)
    assert by_strength.shape == ()
    assert by_strength.item() == pytest.approx(0.535 - discontinuity_score(gradient).item())
    other = DualStrength(0.1, target=0.535)  # neither the features nor the strength matter
    (same,) = torch.autograd.grad(other(7 * z + 1), other.strength, gradient)
    assert same == by_strength


def step(dual: DualStrength, gradient: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    z = torch.zeros_like(gradient, requires_grad=True)
    (dual.strength.grad,) = torch.autograd.grad(dual(z), dual.strength, gradient)
    optimizer.step()
    dual.stepped()


def test_strength_rises_on_rough_gradients_falls_on_smooth_ones_and_stays_in_its_range():
    dual = DualStrength(0.5)
    optimizer = torch.optim.Adam([dual.parameter_group()])
    step(dual, maps(4, 3, 9, 9), optimizer)
    assert dual.value().item() == pytest.approx(0.502)
    for _ in range(300):
        step(dual, maps(4, 3, 9, 9), optimizer)
    assert dual.value() == 1.0
    assert dual.mean_score.item() == pytest.approx(1.05, abs=0.05)
    for _ in range(700):
        step(dual, torch.ones(4, 3, 9, 9), optimizer)
    assert dual.value() == 0.0


def test_strength_can_be_tuned_by_any_score():
    dual = DualStrength(0.5, target=0.0, score=lambda gradient: gradient.abs().mean() * 0 + 0.25)
    z = torch.zeros(1, 1, 4, 4, requires_grad=True)
    (found,) = torch.autograd.grad(dual(z).sum(), dual.strength)
    assert found == -0.25


# -- where it is put ----------------------------------------------------------------------------------------------


def moved_blocks(mixing: SignalMixing) -> list[int]:
    torch.manual_seed(0)
    z = maps(2, 3, 9, 9)
    return [block for block in range(5) if not torch.equal(mixing(z, block), z)]


@pytest.mark.parametrize(("place", "blocks"), [("none", []), ("all", [1, 2, 3, 4]), ("last", [4]), ("input", [0])])
def test_places(place, blocks):
    mixing = SignalMixing(4, place)
    assert moved_blocks(mixing) == blocks
    assert moved_blocks(mixing.eval()) == []
    assert len(list(mixing.parameters())) == 1
    assert sorted(mixing.scores()) == (["mixing_strength", "nd_score"] if blocks else ["nd_score"])


def gradients_of_strengths(mixing: SignalMixing) -> list[torch.Tensor | None]:
    z = maps(2, 3, 9, 9).requires_grad_()
    x = z
    for block in range(5):
        x = mixing(x, block)
    return torch.autograd.grad((x * maps(2, 3, 9, 9, seed=5)).sum(), list(mixing.parameters()), allow_unused=True)


@pytest.mark.parametrize("place", PLACES)
def test_score_is_taken_behind_the_last_block_before_its_mixing_smooths_it(place):
    (gradient,) = gradients_of_strengths(SignalMixing(4, place, initial=1.0))
    assert gradient.item() == pytest.approx(0.535 - discontinuity_score(maps(2, 3, 9, 9, seed=5)).item(), abs=1e-6)


def test_untied_blocks_have_strengths_and_scores_of_their_own():
    torch.manual_seed(0)
    gradients = gradients_of_strengths(SignalMixing(4, "all", tied=False, initial=1.0))
    scores = [0.535 - gradient.item() for gradient in gradients]
    assert scores == sorted(scores)  # every mixing on the way back smooths
    assert scores[0] < 0.8 * scores[-1]
    mixing = SignalMixing(4, "all", tied=False)
    with torch.no_grad():
        mixing.duals[1].strength.zero_()
    assert moved_blocks(mixing) == [1, 3, 4]
    assert sorted(mixing.scores()) == [
        *(f"mixing_strength_{block}" for block in range(1, 5)),
        "nd_score",
        *(f"nd_score_{block}" for block in range(1, 5)),
    ]
    assert mixing.scores()["nd_score"] == mixing.scores()["nd_score_4"]


def test_an_unknown_place_is_named():
    with pytest.raises(ValueError, match="Unknown place='first' of mixing: expected one of none, all, last, input"):
        SignalMixing(4, "first")
