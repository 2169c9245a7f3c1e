import pytest
import torch

from components.control.weighting import advantage_weights, effective_sample_size


def test_known_values():
    advantage = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(
        advantage_weights(advantage, 1.0), torch.tensor([0.0900, 0.2447, 0.6652]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        advantage_weights(advantage, 1.0, "iwis"), torch.tensor([0.0411, 0.1345, 0.8245]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("mode", ["softmax", "iwis"])
def test_limits_and_invariance(mode):
    advantage = torch.randn(50)
    weights = advantage_weights(advantage, 1.0, mode)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    torch.testing.assert_close(advantage_weights(advantage, 1e9, mode), torch.full((50,), 0.02))
    assert advantage_weights(advantage, 1e-3, mode)[advantage.argmax()] > 0.99
    torch.testing.assert_close(advantage_weights(advantage + 100, 1.0, mode), weights, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(advantage_weights(1e4 * advantage, 1.0, mode)).all()


def test_iwis_is_the_odds_of_softmax():
    advantage = torch.randn(10)
    p = advantage_weights(advantage, 0.7)
    torch.testing.assert_close(advantage_weights(advantage, 0.7, "iwis", renormalise=False), p / (1 - p))
    u = advantage / 0.7
    others = torch.stack([(u.exp().sum() - u[i].exp()) for i in range(10)])
    torch.testing.assert_close(advantage_weights(advantage, 0.7, "iwis", renormalise=False), u.exp() / others)


def test_leave_one_out_removes_the_bias_of_self_normalisation():
    """N = 4, x ~ N(0, 1), w = e^x, h = x, whose weighted mean is 1."""
    torch.manual_seed(0)
    x = torch.randn(200_000, 4, dtype=torch.float64)

    def mean(mode, renormalise=True):
        weights = torch.vmap(lambda row: advantage_weights(row, 1.0, mode, renormalise))(x)
        return (weights * x).sum(1).mean(), weights.sum(1).mean()

    assert abs(mean("softmax")[0] - 0.608) < 0.01
    assert abs(mean("iwis")[0] - 0.752) < 0.01
    value, total = mean("iwis", renormalise=False)
    assert abs(value / total - 0.998) < 0.05


def test_effective_sample_size():
    assert effective_sample_size(torch.full((8,), 0.125)) == 8
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == 1


def test_unknown_mode():
    with pytest.raises(ValueError, match="expected one of softmax, iwis"):
        advantage_weights(torch.zeros(2), 1.0, "hard")
