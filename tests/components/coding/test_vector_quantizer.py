import pytest
import torch

from components.coding.vector_quantizer import VectorQuantizer, perplexity


def made(dim: int = 3, codes: int = 5, **settings) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(dim, codes, **settings)


def vectors(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_brute_forces_and_the_first_of_equals():
    quantizer = made()
    z = vectors(7, 4, 3)
    distance = (z[..., None, :] - quantizer.codebook).square().sum(-1)
    assert torch.equal(quantizer.nearest(z), distance.argmin(-1))
    quantizer.codebook.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [1.0, 0, 0], [9.0, 9, 9], [9.0, 9, 9]]))
    assert quantizer.nearest(torch.tensor([[0.0, 0, 0], [1.0, 0, 0]])).tolist() == [0, 0]


def test_gradient_goes_straight_through_beside_that_of_the_commitment():
    quantizer = made().eval()
    z = vectors(6, 3).requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.values, quantizer.codebook[out.index])  # to the bit
    passed = vectors(6, 3, seed=2)
    (gradient,) = torch.autograd.grad((out.values * passed).sum() + 0.25 * out.commitment, z)
    expected = passed + 0.25 * 2 * (z - out.values).detach() / z.numel()
    torch.testing.assert_close(gradient, expected)
    assert out.commitment.item() == pytest.approx((z - out.values).square().mean().item())


def test_outputs_are_of_the_codebook_before_the_step_that_they_cause():
    quantizer = made(decay=0.5)
    quantizer(vectors(64, 3))
    before = quantizer.codebook.clone()
    z = vectors(64, 3, seed=3)
    out = quantizer(z)
    assert torch.equal(out.values.detach(), before[out.index])
    assert not torch.equal(quantizer.codebook, before)


def test_evaluation_changes_nothing():
    quantizer = made()
    quantizer(vectors(64, 3))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()
    quantizer(vectors(64, 3, seed=4))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_one_step_is_the_published_recursion():
    """N <- g N + (1 - g) n; m <- g m + (1 - g) s; e = m / smoothed N."""
    quantizer = made(decay=0.9, eps=1e-2, restart_below=0.0)
    quantizer(vectors(64, 3))
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    z = vectors(40, 3, seed=5)
    index = quantizer.nearest(z)
    quantizer(z)
    for code in range(5):
        own = z[index == code]
        counts[code] = 0.9 * counts[code] + 0.1 * len(own)
        sums[code] = 0.9 * sums[code] + 0.1 * own.sum(0)
    smoothed = (counts + 1e-2) / (counts.sum() + 5e-2) * counts.sum()
    torch.testing.assert_close(quantizer.counts, counts)
    torch.testing.assert_close(quantizer.codebook, sums / smoothed[:, None])


def test_without_memory_a_step_is_that_of_k_means():
    quantizer = made(decay=0.0, eps=1e-9, restart_below=0.0)
    z = vectors(500, 3)
    quantizer(z)
    index = quantizer.nearest(z)
    quantizer(z)
    for code in range(5):
        torch.testing.assert_close(quantizer.codebook[code], z[index == code].mean(0))


def test_the_first_batch_makes_the_codes():
    quantizer = made(restart_below=0.0)
    far = 100 + vectors(64, 3)
    out = quantizer(far)
    assert (out.values - far).abs().max() < 10
    assert (quantizer.codebook - 100).abs().max() < 10  # nothing blows up, codes without vectors neither


def test_dead_codes_are_drawn_anew_from_the_batch():
    quantizer, other = (made(decay=0.5, restart_below=below) for below in (0.5, 0.0))
    z = vectors(64, 3)
    for each in (quantizer, other):
        each(z)
        each.codebook[0] = each.sums[0] = 1000.0
        each.counts[0] = 0.1
        each(z)
    assert (quantizer.codebook[0] - z).abs().sum(1).min() < 1e-4
    assert quantizer.counts[0] == pytest.approx(quantizer.counts.sum().item() / 5, rel=0.2)
    assert other.codebook[0].abs().max() > 500


def test_order_of_codes_permutes_indices_only():
    quantizer, other = made().eval(), made().eval()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    other.codebook.copy_(quantizer.codebook[order])
    z = vectors(30, 3)
    one, another = quantizer(z), other(z)
    assert torch.equal(one.values, another.values)
    assert torch.equal(one.index, order[another.index])


def test_clusters_are_found():
    centres = 5 * vectors(8, 2, seed=6)
    generator = torch.Generator().manual_seed(7)
    quantizer = made(2, 32, decay=0.9)
    for _ in range(200):
        members = torch.randint(8, (256,), generator=generator)
        out = quantizer(centres[members] + 0.05 * torch.randn(256, 2, generator=generator))
    assert out.commitment < 0.01
    assert perplexity(out.index, 32) > 8


def test_half_precision_is_looked_up_in_full():
    quantizer = made().eval()
    z = vectors(200, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), quantizer.eval().nearest(z))
        assert quantizer(z.bfloat16()).values.dtype == torch.bfloat16


def test_perplexity():
    assert perplexity(torch.arange(8), 8) == pytest.approx(8)
    assert perplexity(torch.zeros(5, dtype=torch.long), 8) == pytest.approx(1)


@pytest.mark.parametrize("settings", [{"codes": 1}, {"decay": 1.0}, {"restart_below": -1.0}])
def test_settings_that_make_no_sense_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        made(**settings)


def test_in_double_precision_it_follows_as_in_single():
    single, double = made(decay=0.5, restart_below=0.5), made(decay=0.5, restart_below=0.5).double()
    for step in range(4):
        z = vectors(32, 3, seed=step)
        outs = []
        for quantizer, own in ((single, z), (double, z.double())):
            torch.manual_seed(step)
            outs.append(quantizer(own))
        assert torch.equal(outs[0].index, outs[1].index)
        assert outs[1].values.dtype == double.codebook.dtype == torch.float64
        torch.testing.assert_close(double.codebook.float(), single.codebook, rtol=1e-4, atol=1e-5)
    half = vectors(32, 3, seed=5).bfloat16()  # vectors of another precision than the codebook's
    assert torch.equal(double.eval()(half).index, single.eval()(half).index)
