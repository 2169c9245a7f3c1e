from functools import partial

import pytest
import torch

from components.control.actors import ActorPolicy, DeterministicActor, EntropyTemperature, GaussianActor
from components.networks.encoders import FlatObservations
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP

SMALL = partial(EnsembleMLP, hidden_dim=8)


def test_standard_deviation_starts_in_the_middle_of_its_range():
    actor = GaussianActor(3, 2, SMALL)
    with torch.no_grad():
        actor.network[-1].weight.zero_()
    policy = actor(torch.randn(5, 3))
    torch.testing.assert_close(policy.std, torch.full((5, 2), -4.0).exp())
    assert torch.equal(policy.mean, torch.zeros(5, 2))


@pytest.mark.parametrize("network", [SMALL, partial(EnsembleResidualMLP, hidden_dim=8)])
@pytest.mark.parametrize("make", [GaussianActor, DeterministicActor])
def test_actions_are_inside_of_the_box_and_carry_gradients(make, network):
    actor, observation = make(3, 2, network), torch.randn(5, 3)
    for action in (actor.act(observation), actor.explore(observation), *actor.bootstrap(observation)[:1]):
        assert action.shape == (5, 2)
        assert action.abs().max() <= 1
    action, log_prob = actor(observation).sample_with_log_prob()
    assert log_prob.shape == (5,)
    action.sum().backward()
    assert all(parameter.grad is not None for parameter in actor.network[-1].parameters())


def test_noise_of_the_deterministic_actor():
    torch.manual_seed(0)
    actor = DeterministicActor(3, 2, SMALL, exploration_std=0.1, target_std=0.2, target_clip=0.3)
    observation = torch.randn(1, 3).expand(20_000, 3)
    mean = actor.act(observation)
    assert (actor.explore(observation) - mean).std().item() == pytest.approx(0.1, rel=0.02)
    bootstrapped, log_prob = actor.bootstrap(observation)
    noise = bootstrapped - mean
    assert noise.abs().max() <= 0.3 + 1e-6
    assert ((noise.abs() > 0.3 - 1e-6).float().mean()).item() == pytest.approx(0.1336, abs=0.01)  # beyond 1.5 sigma
    assert torch.equal(actor(observation).sample(), mean)
    assert not log_prob.any()


def test_policy_module_shares_the_actor():
    actor = GaussianActor(3, 2, SMALL)
    policy = ActorPolicy(FlatObservations([3]), actor, "act")
    assert list(policy.parameters()) == list(actor.parameters())
    assert not policy(torch.randn(5, 3)).requires_grad


def test_temperature_falls_when_entropy_is_above_its_target():
    temperature = EntropyTemperature(2, initial=0.5, target_entropy=None)
    assert temperature().item() == pytest.approx(0.5)
    log_prob = torch.tensor([1.0, -2.0], requires_grad=True)  # entropy 0.5, target -2
    temperature.loss(log_prob).backward()
    assert temperature.log_alpha.grad.item() == pytest.approx(0.5 + 2)
    assert log_prob.grad is None
