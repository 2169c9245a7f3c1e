import itertools
import math

import pytest
import torch

from components.control.pessimism import (
    DualPessimism,
    FixedPessimism,
    MinimumPessimism,
    SubsetMinimumPessimism,
    pairwise_disagreement,
    pessimistic_mean,
)

MEMBERS = [2, 3, 5, 10]


def pairs(x):
    return [(x[p], x[q]) for p, q in itertools.combinations(range(len(x)), 2)]


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("pessimism", [-0.5, 0.0, 0.5, 1.3])
def test_pessimistic_mean_is_the_pairwise_formula(members, pessimism):
    x = torch.randn(members, 6)
    ordered = [(x[p] - x[q]).abs() for p, q in itertools.permutations(range(members), 2)]
    torch.testing.assert_close(pessimistic_mean(x, pessimism), x.mean(0) - pessimism * sum(ordered) / len(ordered))


@pytest.mark.parametrize("members", MEMBERS)
def test_half_pessimism_is_the_mean_of_pairwise_minima_and_half_optimism_that_of_maxima(members):
    x = torch.randn(members, 6)
    minima, maxima = (sum(f(p, q) for p, q in pairs(x)) / len(pairs(x)) for f in (torch.minimum, torch.maximum))
    torch.testing.assert_close(pessimistic_mean(x, 0.5), minima)
    torch.testing.assert_close(pessimistic_mean(x, -0.5), maxima)
    assert torch.equal(pessimistic_mean(x[:1], 0.5), x[0])


def test_half_pessimism_of_two_is_the_minimum_forward_and_backward():
    gradients = []
    for pessimism in (FixedPessimism(0.5), MinimumPessimism()):
        torch.manual_seed(0)
        q = torch.randn(2, 6, 1, requires_grad=True)
        value = pessimism.actor(q)
        torch.testing.assert_close(value, q[..., 0].amin(0))
        torch.testing.assert_close(pessimism.target(q), q.amin(0))
        value.sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients)
    assert torch.equal(gradients[1].sum(0), torch.ones(6, 1))


@pytest.mark.parametrize("members", MEMBERS)
def test_gradient_by_rank(members):
    beta = 0.7
    q = torch.randn(members, 1, 1, requires_grad=True)
    FixedPessimism(beta).target(q).sum().backward()
    ranks = torch.arange(1, members + 1)
    expected = 1 / members - 2 * beta * (2 * ranks - members - 1) / (members * (members - 1))
    torch.testing.assert_close(q.grad[q.detach()[:, 0, 0].argsort(), 0, 0], expected)
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))


def test_disagreement_is_invariant_to_shifts_and_order_and_scales():
    x = torch.randn(5, 7)
    u = pairwise_disagreement(x)
    torch.testing.assert_close(pairwise_disagreement(x + 3.0), u)
    torch.testing.assert_close(pairwise_disagreement(-2 * x), 2 * u)
    torch.testing.assert_close(pairwise_disagreement(x[torch.randperm(5)]), u)
    torch.testing.assert_close(pairwise_disagreement(x[:2].repeat(2, 1)), pairwise_disagreement(x[:2]) * 2 / 3)
    torch.manual_seed(0)
    normal = pairwise_disagreement(1.5 * torch.randn(6, 200_000)).mean()
    assert normal == pytest.approx(2 * 1.5 / math.sqrt(math.pi), rel=5e-3)


def test_std_is_the_population_one():
    x = torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    value = FixedPessimism(1.0, uncertainty="std").target(x)
    assert value.item() == pytest.approx(3.0 - math.sqrt((4 + 1 + 9) / 3))


def test_quantiles_are_compared_in_order():
    torch.manual_seed(0)
    q = torch.randn(3, 4, 9).sort(-1).values
    pessimism = FixedPessimism(0.8)
    shuffled = torch.stack([member[:, torch.randperm(9)] for member in q])
    torch.testing.assert_close(pessimism.target(shuffled), pessimism.target(q))
    distances = sum((p - q_).abs().mean(-1, keepdim=True) for p, q_ in pairs(q)) / 3
    torch.testing.assert_close(pessimism.target(q), q.mean(0) - 0.8 * distances)
    shifted = torch.stack([q[0], q[0] + 0.5])
    torch.testing.assert_close(pessimism.target(shifted), q[0] + 0.25 - 0.8 * 0.5)


def test_random_pairs_are_half_pessimism_on_average():
    torch.manual_seed(0)
    q = torch.randn(10, 3, 1)
    redq = SubsetMinimumPessimism(2)
    drawn = [redq.target_members(10, q.device) for _ in range(20_000)]
    average = torch.stack([redq.target(q[chosen]) for chosen in drawn]).mean(0)
    torch.testing.assert_close(average, FixedPessimism(0.5).target(q), rtol=0, atol=0.02)
    torch.testing.assert_close(redq.actor(q), q.mean((0, 2)))


def test_the_first_critic_alone():
    q, td3 = torch.randn(2, 5, 1), MinimumPessimism("first")
    assert torch.equal(td3.actor(q[td3.actor_members(2, q.device)]), q[0, :, 0])


def test_gradient_of_beta_is_the_mean_error():
    dual = DualPessimism(0.5)
    errors = torch.randn(4, 8, requires_grad=True)
    dual.loss(errors).backward()
    torch.testing.assert_close(dual.beta.grad, errors.detach().mean())
    assert errors.grad is None
    optimizer = torch.optim.SGD([dual.beta], lr=0.1)
    optimizer.step()
    torch.testing.assert_close(dual.beta.detach(), 0.5 - 0.1 * errors.detach().mean())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_adam_moves_beta_by_the_learning_rate(size):
    dual = DualPessimism(0.5)
    optimizer = torch.optim.Adam([dual.beta], 1e-3, betas=(0.5, 0.999), eps=1e-7)
    for step in range(1, 6):
        optimizer.zero_grad()
        dual.loss(torch.full((2, 3), -size)).backward()
        optimizer.step()
        assert dual.beta.item() == pytest.approx(0.5 + 1e-3 * step, rel=1e-3)  # targets too high: it rises


def test_optimism_anneals_to_exactly_zero():
    dual = DualPessimism(0.3, shift=-0.5, shift_steps=5)
    assert (dual.actor_beta - dual.beta).item() == pytest.approx(-0.5)
    found = []
    for _ in range(7):
        with torch.no_grad():
            dual.beta += 0.1
        dual.stepped()
        found.append((dual.actor_beta - dual.beta).item())
    assert found == pytest.approx([-0.4, -0.3, -0.2, -0.1, 0, 0, 0], abs=1e-6)
    assert dual.shift.item() == pytest.approx(0, abs=1e-7)


def test_untied_actor_keeps_its_own_pessimism():
    dual = DualPessimism(0.3, actor_beta=0.75)
    with torch.no_grad():
        dual.beta += 1
    dual.stepped()
    assert dual.actor_beta == 0.75


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinimumPessimism("mean"), "Unknown actor='mean': expected min or first"),
        (lambda: FixedPessimism(uncertainty="iqr"), "Unknown uncertainty='iqr': expected one of pairwise, std"),
        (lambda: DualPessimism(shift=-0.5, actor_beta=0.5), "shift=-0.5: expected 0 beside a fixed actor_beta"),
        (lambda: DualPessimism(sign=0), "sign=0: expected 1 or -1"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
