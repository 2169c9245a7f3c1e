import pytest
import torch

from components.networks.diagnostics import correlation, effective_rank, jacobian_norm


def test_correlation_is_pearsons():
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(correlation(x, x + y), torch.corrcoef(torch.stack([x, x + y]))[0, 1])
    assert correlation(x, -2 * x + 3).item() == pytest.approx(-1)
    assert correlation(x, torch.ones(50)) == 0


def test_effective_rank_counts_what_matters():
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0))).Q
    for values, expected in (([1.0] * 4, 4), ([1.0, 1.0, 1e-3], 2), ([5.0], 1)):
        features = basis[:, : len(values)] @ torch.diag(torch.tensor(values)) @ basis[: len(values)]
        assert effective_rank(features) == expected


def test_jacobian_norm_of_a_linear_map_is_that_of_its_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(5, 7)
    estimate = jacobian_norm(lambda x: x.flatten(1) @ matrix.T, torch.zeros(200, 7, 1), probes=50)
    assert estimate.item() == pytest.approx(matrix.norm().item(), rel=0.02)
    inputs = torch.zeros(2, 7)
    jacobian_norm(lambda x: x @ matrix.T, inputs)
    assert not inputs.requires_grad
