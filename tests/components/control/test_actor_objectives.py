import math

import pytest
import torch

from components.control.actor_objectives import AdvantageWeighted, Critic, ReparameterisedGradient
from components.control.policies import ClippedGaussianPolicy, DeterministicPolicy, TanhGaussianPolicy


def critic_of(values, **known):
    """A critic that believes the mean of its ensemble."""
    return Critic(values, lambda action: values(action).mean(0), **known)


def quadratic_critic(best):
    return critic_of(lambda action: -torch.stack([k * (action - best).square().sum(-1) for k in (1, 2)]))


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
    critic = critic_of(lambda action: (action * weight).sum(-1)[None])
    loss, _ = AdvantageWeighted()(ClippedGaussianPolicy(mean, 0.2), torch.rand(4, 3), critic)
    assert torch.autograd.grad(loss, weight, allow_unused=True, retain_graph=True) == (None,)


def test_policy_gradient_climbs_the_minimum_of_two_critics():
    torch.manual_seed(0)
    mean = torch.full((5, 2), 0.2, requires_grad=True)
    policy = ClippedGaussianPolicy(mean, 1e-6)
    loss, metrics = ReparameterisedGradient(pessimism=0.5)(policy, torch.zeros(5, 2), quadratic_critic(0.5))
    (gradient,) = torch.autograd.grad(loss, mean)
    torch.testing.assert_close(loss.detach(), torch.tensor(2 * 2 * 0.09), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, torch.full((5, 2), -2 * 2 * 0.3 / 5), rtol=1e-3, atol=1e-4)
    assert metrics["actor_value"] == -loss


def test_behaviour_cloning_term_is_scaled_by_the_mean_value():
    policy = ClippedGaussianPolicy(torch.zeros(5, 2), 1e-6)
    action = torch.full((5, 2), 0.5)
    loss, _ = ReparameterisedGradient(behaviour_cloning=2.0)(
        policy, action, critic_of(lambda a: torch.full((1, 5), -3.0))
    )
    torch.testing.assert_close(loss, torch.tensor(1.0 + 2.0 * 0.25), rtol=1e-3, atol=1e-4)


def test_behaviour_cloning_scaled_by_the_distance_has_the_same_minimum():
    """Of a constant value q the loss is -q + c |q| D; the size of the value is a constant in its gradient."""
    torch.manual_seed(0)
    mean, action = torch.rand(5, 2, requires_grad=True), torch.rand(5, 2)
    critic = critic_of(lambda a: torch.stack([a.sum(-1) - 7.0] * 2))
    forms = [ReparameterisedGradient(behaviour_cloning=0.4, scaled=scaled) for scaled in ("value", "distance")]
    found = [objective(DeterministicPolicy(mean), action, critic)[0] for objective in forms]
    size = (mean.detach().sum(-1) - 7.0).abs().mean()
    torch.testing.assert_close(found[1], size * found[0])
    gradients = [torch.autograd.grad(loss, mean)[0] for loss in found]
    torch.testing.assert_close(gradients[1], size * gradients[0])
    expected = -1 / 5 + 0.4 * size * 2 * (mean - action).detach() / 10
    torch.testing.assert_close(gradients[1], expected)
    (summed, _) = ReparameterisedGradient(behaviour_cloning=0.2, scaled="distance", over_action="sum")(
        DeterministicPolicy(mean), action, critic
    )
    torch.testing.assert_close(summed, found[1])


def test_entropy_counts_as_reward_where_it_has_a_weight():
    policy = TanhGaussianPolicy(torch.randn(5, 2), torch.full((5, 2), 0.5))
    critic = critic_of(lambda a: a.sum(-1)[None], entropy_weight=torch.tensor(0.7))
    torch.manual_seed(1)
    loss, metrics = ReparameterisedGradient()(policy, torch.zeros(5, 2), critic)
    torch.manual_seed(1)
    action, log_prob = policy.sample_with_log_prob()
    torch.testing.assert_close(loss, (0.7 * log_prob - action.sum(-1)).mean())
    torch.testing.assert_close(metrics["entropy"], -log_prob.mean())
    with pytest.raises(ValueError, match=r"noise_clip=0.3: expected null with an entropy bonus"):
        ReparameterisedGradient(noise_clip=0.3)(policy, torch.zeros(5, 2), critic)


def advantage_weighted(action, mean, critic, **settings):
    return AdvantageWeighted(**settings)(ClippedGaussianPolicy(mean, 0.2), action, critic)


def test_a_batch_twice_halves_the_mean_of_softmax_weighted_losses_and_leaves_their_sum():
    torch.manual_seed(0)
    mean, action = torch.zeros(6, 3), torch.rand(6, 3)
    twice = [torch.cat([x, x]) for x in (action, mean)]
    critic = critic_of(lambda a: a.square().sum(-1)[None])
    for over_batch, factor in (("mean", 0.5), ("sum", 1.0)):
        settings = {"weighting": "softmax", "over_batch": over_batch, "advantage": "state"}
        advantage = torch.randn(6)
        losses = [
            advantage_weighted(*each, Critic(critic.values, critic.believed, known), **settings)[0]
            for each, known in (((action, mean), advantage), (twice, advantage.repeat(2)))
        ]
        torch.testing.assert_close(losses[1], factor * losses[0])
        weights = advantage.softmax(0)
        log_prob = torch.distributions.Normal(mean, 0.2).log_prob(action).mean(-1)
        torch.testing.assert_close(losses[0], -(weights * log_prob).sum() / (6 if over_batch == "mean" else 1))


def test_exponential_weights_are_bounded_and_their_loss_is_a_mean_of_joint_densities():
    action, mean = torch.rand(4, 3), torch.zeros(4, 3)
    advantage = torch.tensor([-1.0, 0.0, 0.5, 50.0])
    critic = critic_of(lambda a: a.sum(-1)[None], advantage=advantage)
    settings = {"weighting": "exp", "over_batch": "mean", "over_action": "sum", "advantage": "state"}
    loss, metrics = advantage_weighted(action, mean, critic, temperature=0.5, **settings)
    weights = torch.tensor([math.exp(-2), 1.0, math.e, 100.0])
    log_prob = torch.distributions.Normal(mean, 0.2).log_prob(action).sum(-1)
    torch.testing.assert_close(loss, -(weights * log_prob).mean())
    assert metrics["max_weight"] == 100.0


def test_the_datas_action_is_as_pessimistic_as_asked_and_advantages_are_cut_off():
    """The advantage of MOOD has the plain mean at the data's action, that of CORL's AWAC the minimum at both."""
    action, mean = torch.tensor([[0.4], [-0.2]]), torch.zeros(2, 1)
    critic = critic_of(lambda a: torch.cat([a, 3 * a], -1).movedim(-1, 0))  # disagrees by 2 |a|
    for pessimism, values in ((0.0, [0.8, -0.4]), (0.5, [0.4, -0.6]), (None, [0.8, -0.4])):
        _, metrics = AdvantageWeighted(data_pessimism=pessimism, pessimism=0.0)(
            ClippedGaussianPolicy(mean, 1e-9), action, critic
        )
        assert metrics["advantage"].item() == pytest.approx(sum(values) / 2)
    _, metrics = AdvantageWeighted(weighting="exp", data_pessimism=0.0, pessimism=0.0, max_advantage=0.5)(
        ClippedGaussianPolicy(mean, 1e-9), action, critic
    )
    assert metrics["max_weight"].item() == pytest.approx(math.exp(0.5))


def test_an_agent_without_a_state_value_has_no_advantages_over_it():
    with pytest.raises(ValueError, match=r"advantage=state: expected an agent that learns a state value"):
        advantage_weighted(torch.zeros(2, 1), torch.zeros(2, 1), quadratic_critic(0.0), advantage="state")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdvantageWeighted(weighting="hard"), "Unknown weighting='hard': expected one of softmax, iwis, exp"),
        (lambda: AdvantageWeighted(advantage="best"), "Unknown advantage='best': expected one of policy, state"),
        (lambda: AdvantageWeighted(over_batch="max"), "Unknown over_batch='max': expected one of mean, sum"),
        (lambda: ReparameterisedGradient(scaled="both"), "Unknown scaled='both': expected one of value, distance"),
        (lambda: ReparameterisedGradient(over_action="min"), "Unknown over_action='min': expected one of mean, sum"),
    ],
)
def test_unknown_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()
