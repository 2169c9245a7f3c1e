import itertools

import pytest
import torch
from torch import nn

from components.ensemble import EnsembleLayerNorm, EnsembleLinear
from components.pessimism import pessimistic_mean


def test_members_equal_separate_layers():
    ensemble, norm = EnsembleLinear(3, 4, 5), EnsembleLayerNorm(3, 5)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = torch.randn(7, 4)
    result = norm(ensemble(x))
    assert result.shape == (3, 7, 5)
    for p in range(3):
        linear = x @ ensemble.weight[p] + ensemble.bias[p]
        separate = nn.functional.layer_norm(linear, (5,), norm.weight[p, 0], norm.bias[p, 0])
        torch.testing.assert_close(result[p], separate)
    torch.testing.assert_close(ensemble(x.expand(3, 7, 4)), ensemble(x))


@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("pessimism", [-0.5, 0.0, 0.5, 1.3])
def test_pessimistic_mean_is_the_pairwise_formula(members, pessimism):
    x = torch.randn(members, 6)
    pairs = [(x[p] - x[q]).abs() for p, q in itertools.permutations(range(members), 2)]
    torch.testing.assert_close(pessimistic_mean(x, pessimism), x.mean(0) - pessimism * sum(pairs) / len(pairs))


def test_half_pessimism_is_the_mean_of_pairwise_minima():
    x = torch.randn(4, 6)
    minima = [torch.minimum(x[p], x[q]) for p, q in itertools.combinations(range(4), 2)]
    torch.testing.assert_close(pessimistic_mean(x, 0.5), sum(minima) / len(minima))
    torch.testing.assert_close(pessimistic_mean(x[:2], 0.5), x[:2].min(0).values)
    assert torch.equal(pessimistic_mean(x[:1], 0.5), x[0])
