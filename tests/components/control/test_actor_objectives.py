import pytest
import torch

from components.control.actor_objectives import AdvantageWeighted, DeterministicPolicyGradient
from components.control.policies import ClippedGaussianPolicy


def quadratic_critic(best):
    return lambda action: -torch.stack([(action - best).square().sum(-1), 2 * (action - best).square().sum(-1)])


def test_infinite_temperature_is_behaviour_cloning():
    torch.manual_seed(0)
    mean, action = torch.rand(6, 3, requires_grad=True), torch.rand(6, 3)
    loss, metrics = AdvantageWeighted(temperature=1e9)(ClippedGaussianPolicy(mean, 0.2), action, quadratic_critic(0.3))
    (gradient,) = torch.autograd.grad(loss, mean)
    torch.testing.assert_close(gradient, (mean - action).detach() / (0.2**2 * 3) / 6, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["effective_sample_size"], torch.tensor(6.0))


def test_weights_favour_the_better_action():
    torch.manual_seed(0)
    mean = torch.zeros(2, 3, requires_grad=True)
    action = torch.tensor([[0.3] * 3, [-0.9] * 3])
    loss, metrics = AdvantageWeighted(temperature=0.01)(ClippedGaussianPolicy(mean, 0.2), action, quadratic_critic(0.3))
    (gradient,) = torch.autograd.grad(loss, mean)
    assert gradient[0].abs().min() > 100 * gradient[1].abs().max()
    assert metrics["max_weight"] > 0.99


def test_no_gradient_reaches_the_critic_or_the_weights():
    weight = torch.ones(3, requires_grad=True)
    mean = torch.zeros(4, 3, requires_grad=True)
    critic = lambda action: (action * weight).sum(-1)[None]  # noqa: E731
    loss, _ = AdvantageWeighted()(ClippedGaussianPolicy(mean, 0.2), torch.rand(4, 3), critic)
    assert torch.autograd.grad(loss, weight, allow_unused=True, retain_graph=True) == (None,)


def test_policy_gradient_climbs_the_minimum_of_two_critics():
    torch.manual_seed(0)
    mean = torch.full((5, 2), 0.2, requires_grad=True)
    policy = ClippedGaussianPolicy(mean, 1e-6)
    loss, metrics = DeterministicPolicyGradient()(policy, torch.zeros(5, 2), quadratic_critic(0.5))
    (gradient,) = torch.autograd.grad(loss, mean)
    torch.testing.assert_close(loss.detach(), torch.tensor(2 * 2 * 0.09), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, torch.full((5, 2), -2 * 2 * 0.3 / 5), rtol=1e-3, atol=1e-4)
    assert metrics["actor_value"] == -loss


def test_behaviour_cloning_term_is_scaled_by_the_mean_value():
    policy = ClippedGaussianPolicy(torch.zeros(5, 2), 1e-6)
    action = torch.full((5, 2), 0.5)
    loss, _ = DeterministicPolicyGradient(behaviour_cloning=2.0)(policy, action, lambda a: torch.full((1, 5), -3.0))
    torch.testing.assert_close(loss, torch.tensor(1.0 + 2.0 * 0.25), rtol=1e-3, atol=1e-4)


def test_unknown_weighting():
    with pytest.raises(ValueError, match="softmax, iwis"):
        AdvantageWeighted(weighting="hard")
