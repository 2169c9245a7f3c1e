import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from components.language.singular_values import SVD, SingularValueScaling, checksum, decompose, factorise, unscaled

SHAPES = [(6, 4), (4, 6), (5, 5), (3, 6, 4)]


def made(shape=(6, 4), dtype=torch.float64, **settings) -> tuple[SingularValueScaling, torch.Tensor]:
    """A scaling of a random weight, and a random p."""
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    scaling = SingularValueScaling(weight, decompose(weight), **settings).to(dtype)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for name, part in (("u", u), ("s", s), ("vh", vh)):
        setattr(scaling, name, nn.Parameter(part, requires_grad=False))
    return scaling, torch.randn(*shape[:-2], min(shape[-2:]), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_scales_leave_the_weight_alone(shape):
    scaling, p = made(shape)
    torch.testing.assert_close(scaling(torch.full_like(p, -1.3)), scaling.weight)
    plain, _ = made(shape, rescale="none", parametrization="direct")
    torch.testing.assert_close(plain(*plain.right_inverse(plain.weight)), plain.weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_scaled_and_keep_their_sum(shape):
    scaling, p = made(shape)
    weight = scaling(p)
    values = torch.linalg.svdvals(weight)
    expected = scaling.s * p.sigmoid()
    expected = expected * scaling.s.sum(-1, keepdim=True) / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(values, expected.sort(descending=True).values)
    torch.testing.assert_close(values.sum(-1), torch.linalg.svdvals(scaling.weight).sum(-1))
    turned = scaling.u.mT @ weight @ scaling.vh.mT
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)))
    plain, _ = made(shape, rescale="none", initial_mean=0.0)
    torch.testing.assert_close(torch.linalg.svdvals(plain(p)), (plain.s * p.sigmoid()).sort(descending=True).values)


def test_a_stack_is_scaled_matrix_by_matrix():
    scaling, p = made((3, 6, 4))
    gradient = torch.randn(3, 6, 4, dtype=torch.float64)
    for member in range(3):
        own = SingularValueScaling(
            scaling.weight[member], SVD(*(part[member] for part in (scaling.u, scaling.s, scaling.vh)))
        )
        torch.testing.assert_close(scaling(p)[member], own(p[member]))
        torch.testing.assert_close(scaling.pull_back(p, gradient)[member], own.pull_back(p[member], gradient[member]))


def test_scales_at_which_the_sigmoid_has_rounded_come_back():
    p = torch.tensor([-120.0, -80.0, -3.0, 0.0, 5.0, 17.0, 40.0])
    found = unscaled(2 * p.sigmoid(), 2.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sigmoid(), p.sigmoid())
    torch.testing.assert_close(found[1:5], p[1:5], rtol=1e-4, atol=1e-4)  # where it has not, p itself


def test_only_the_profile_of_scales_matters_with_rescaling():
    scaling, p = made()
    z = scaling.scales(p)
    torch.testing.assert_close(scaling.compose(3 * z), scaling.compose(z))
    for most in (2.0, 5.0):
        other, _ = made(max_scale=most)
        torch.testing.assert_close(other(p), scaling(p))
        gradient = torch.randn(6, 4, dtype=torch.float64)
        torch.testing.assert_close(other.pull_back(p, gradient), scaling.pull_back(p, gradient))


def test_scales_of_zero_are_the_weight_itself_where_there_is_nothing_to_rescale():
    scaling, p = made()
    torch.testing.assert_close(scaling.compose(torch.zeros_like(p)), scaling.weight)
    assert scaling.pull_back(torch.zeros_like(p), torch.randn(6, 4, dtype=torch.float64)).isfinite().all()
    plain, _ = made(rescale="none", parametrization="direct")
    assert not plain.compose(torch.zeros_like(p)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", ["nuclear", "none"])
@pytest.mark.parametrize("parametrization", ["sigmoid", "direct"])
def test_closed_form_gradient_is_that_of_autograd(shape, rescale, parametrization):
    scaling, p = made(shape, rescale=rescale, parametrization=parametrization, initial_mean=0.0)
    gradient = torch.randn(shape, dtype=torch.float64)
    p.requires_grad_()
    (expected,) = torch.autograd.grad(scaling(p), p, gradient)
    torch.testing.assert_close(scaling.pull_back(p, gradient), expected, rtol=1e-10, atol=1e-10)
    if rescale == "nuclear" and parametrization == "direct":
        assert abs((p.detach() * expected).sum().item()) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_factors_one_after_the_other_are_the_composed_weight(bias):
    torch.manual_seed(0)
    layers = [nn.Linear(7, 5, bias=bias) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 3, 7)
    for layer in layers:
        scaling = SingularValueScaling(layer.weight, decompose(layer.weight), initial_std=1.0)
        torch.manual_seed(1)
        parametrize.register_parametrization(layer, "weight", scaling)
    factorise(layers[1])
    outputs = [layer(x) for layer in layers]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(output.square().sum(), layer.parametrizations.weight.original0)[0]
        for layer, output in zip(layers, outputs)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"weight: expected a matrix, found the shape \[3\]"):
        decompose(torch.randn(3))
    with pytest.raises(ValueError, match="weight: expected finite numbers, found NaN or infinity"):
        decompose(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"svd: expected one of a weight \[32, 8\]"):
        SingularValueScaling(torch.randn(32, 8), decompose(torch.randn(3, 4)))


def test_half_precision_weights_have_parameters_of_single_precision():
    weight = torch.randn(8, 6).bfloat16()
    scaling = SingularValueScaling(weight, decompose(weight))
    (p,) = scaling.right_inverse(weight)
    assert p.dtype == scaling.u.dtype == scaling.scales(p).dtype == torch.float32
    assert scaling(p).dtype == torch.bfloat16
    assert scaling.pull_back(p, torch.randn(8, 6).bfloat16()).dtype == torch.float32
    assert abs(p.mean().item() - 0.1) < 0.02


def test_decompositions_are_kept_by_the_weights_they_are_of(tmp_path, monkeypatch):
    weight = torch.randn(6, 4)
    first = decompose(weight, tmp_path)
    torch.testing.assert_close(first.u * first.s @ first.vh, weight)
    assert (first.s.diff() <= 0).all()
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("decomposed again"))
    again = decompose(weight.clone(), tmp_path)
    assert all(torch.equal(one, another) for one, another in zip(first, again))
    assert all(one.stride() == another.stride() for one, another in zip(first, again))
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    with pytest.raises(pytest.fail.Exception):  # made anew
        decompose(weight, tmp_path)
    assert checksum(weight) != checksum(weight.T.contiguous())
    assert checksum(weight) != checksum(weight.double())
    with pytest.raises(pytest.fail.Exception):
        decompose(weight + 1, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rescale": "x"}, "Unknown rescale='x'"),
        ({"parametrization": "x"}, "Unknown parametrization='x'"),
        ({"rescale": "none"}, "rescale=none: expected parametrization=direct"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)
