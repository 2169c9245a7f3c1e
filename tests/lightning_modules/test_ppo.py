"""Proximal policy optimisation: what it learns from, its losses, and answers that are known."""

import copy
import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from components.control.actors import NormalActor
from components.control.normalisation import ObservationNormaliser, RewardNormaliser
from components.control.on_policy import generalised_advantages
from components.networks.ensemble import EnsembleMLP
from datamodules.behaviours.trained import policy_weights, save_policy
from lightning_modules.ppo import ProximalPolicyOptimisation

NETWORK = partial(EnsembleMLP, hidden_dim=16, activation="tanh")


def make(observation=3, actions=2, **settings):
    torch.manual_seed(0)
    settings = {"updates": 100, **settings}
    return ProximalPolicyOptimisation(
        [observation], actions, actor=partial(NormalActor, network=NETWORK), value=NETWORK, **settings
    )


def rollout(rows=4, steps=6, observation=3, actions=2, seed=1):
    """One whose steps lead to where the next begin, but for ends of episodes."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(rows, steps + 1, observation, generator=generator)
    terminated, truncated = torch.rand(2, rows, steps, 1, generator=generator) < 0.2
    done = terminated | truncated
    following = torch.where(done, torch.randn(rows, steps, observation, generator=generator), seen[:, 1:])
    return TensorDict(
        {
            "observation": seen[:, :-1],
            "action": torch.randn(rows, steps, actions, generator=generator),
            "next": {
                "observation": following,
                "reward": torch.randn(rows, steps, 1, generator=generator),
                "terminated": terminated,
                "done": done,
            },
        },
        batch_size=[rows, steps],
    )


def test_prepared_values_are_of_where_each_step_led_be_it_an_end():
    method, data = make(reward_scale=0.5, discount=0.8, trace=0.6), rollout()
    prepared, carried = method.prepare(data, None)
    assert carried is None
    prepared = prepared.view(4, 6)
    with torch.no_grad():
        seen = data["observation"], data["next", "observation"]
        value, after = (method.value(each.flatten(0, 1)).view(4, 6) for each in seen)
    flags = data["next", "terminated"].squeeze(-1), data["next", "done"].squeeze(-1)
    expected = generalised_advantages(0.5 * data["next", "reward"].squeeze(-1), value, after, *flags, 0.8, 0.6)
    assert torch.allclose(prepared["value"], value, atol=1e-6)
    assert torch.allclose(prepared["advantage"], expected, atol=1e-5)
    assert torch.allclose(prepared["return"], expected + value, atol=1e-5)


def test_the_first_batch_of_a_rollout_has_not_moved():
    method = make(normaliser=ObservationNormaliser)
    for seed in range(3):  # though the normaliser has, for the next
        prepared, _ = method.prepare(rollout(seed=seed), None)
        metrics = method.update(prepared)
        assert metrics["divergence"].abs() < 1e-9
        assert metrics["clip_fraction"] == 0
        method.update(prepared)


def test_observations_are_normalised_by_what_was_seen_before_their_rollout():
    method, first, second = make(normaliser=ObservationNormaliser), rollout(seed=1), rollout(seed=2)
    prepared, _ = method.prepare(first, None)
    assert torch.equal(prepared["observation"], first["observation"].flatten(0, 1))
    prepared, _ = method.prepare(second, None)
    std, mean = torch.std_mean(first["observation"].flatten(0, 1), 0, correction=0)
    assert torch.allclose(prepared["observation"], (second["observation"].flatten(0, 1) - mean) / std, atol=1e-4)
    policy, features = method.policy(), method.normaliser(first["observation"][0])
    acted = policy(TensorDict({"observation": first["observation"][0]}, [6]))["action"]
    assert torch.allclose(acted, method.actor(features).mean)


def test_an_update_is_a_step_on_the_losses_written_out():
    settings = {"value_clip": 0.3, "entropy_weight": 0.02, "value_weight": 0.7, "max_norm": 0.1, "clip": 0.15}
    method = make(**settings)
    prepared, _ = method.prepare(rollout(), None)
    prepared["log_prob"] += 0.3 * torch.randn(24)
    prepared["value"] += torch.randn(24)
    other = copy.deepcopy(method)
    optimizer = torch.optim.Adam([*other.actor.parameters(), *other.value.parameters()], 3e-4, eps=1e-5)
    for _ in range(3):
        method.update(prepared)
        mean, std = other.actor.network(prepared["observation"])[0], other.actor.log_std.exp()
        normal = torch.distributions.Normal(mean, std)
        ratio = (normal.log_prob(prepared["action"]).sum(-1) - prepared["log_prob"]).exp()
        advantage = prepared["advantage"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-7)
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.85, 1.15) * advantage).mean()
        value = other.value(prepared["observation"]).flatten()
        near = prepared["value"] + (value - prepared["value"]).clamp(-0.3, 0.3)
        error = torch.maximum((value - prepared["return"]) ** 2, (near - prepared["return"]) ** 2).mean()
        optimizer.zero_grad()
        (-gain + 0.7 * 0.5 * error - 0.02 * normal.entropy().sum(-1).mean()).backward()
        torch.nn.utils.clip_grad_norm_([*other.actor.parameters(), *other.value.parameters()], 0.1)
        optimizer.step()
    for own, expected in zip(method.parameters(), other.parameters()):
        assert torch.allclose(own, expected, atol=1e-6)


@pytest.mark.parametrize(("moved", "factor"), [(0.05, 1 / 1.5), (0.01, 1.0), (0.001, 1.5)])
def test_the_learning_rate_follows_the_divergence(moved, factor):
    method = make(target_divergence=0.012)
    method.divergence.fill_(moved)
    method.prepare(rollout(), None)
    assert method.learning_rate_factors() == [1.0]  # there was no update before
    method.updates = 20
    method.prepare(rollout(), None)
    assert method.learning_rate_factors() == pytest.approx([factor])
    for _ in range(30):
        method.prepare(rollout(), None)
    assert 0.009 < method.learning_rate_factors()[0] < 101


def test_rewards_are_carried_over_from_rollout_to_rollout():
    method = make(reward_normaliser=RewardNormaliser(0.9))
    _, carried = method.prepare(rollout(seed=1), None)
    assert carried.shape == (4,)
    own, _ = copy.deepcopy(method).prepare(rollout(seed=2), carried)
    other, _ = method.prepare(rollout(seed=2), torch.zeros(4))
    assert not torch.allclose(own["advantage"], other["advantage"])


def test_one_begins_with_the_policy_of_a_file(tmp_path):
    done, other = (make(normaliser=ObservationNormaliser) for _ in range(2))
    done.normaliser.merge(torch.randn(50, 3))
    with torch.no_grad():
        for parameter in done.parameters():
            parameter.add_(0.1)
    save_policy(done.policy(exploring=True).module, tmp_path / "a.safetensors")
    weights = {"state_dict": policy_weights(tmp_path / "a.safetensors", other)}
    assert other.begin_from(weights, ["actor", "normaliser"]) == {
        "taken": ["actor", "normaliser"],
        "left": ["value"],
        "unused": [],
    }
    observation = TensorDict({"observation": torch.randn(5, 3)}, [5])
    assert torch.equal(other.policy()(observation.clone())["action"], done.policy()(observation)["action"])
    with pytest.raises(
        ValueError, match=r"a\.safetensors: expected the weights of a policy such as .*, found another:"
    ):
        policy_weights(tmp_path / "a.safetensors", make())
    with pytest.raises(ValueError, match=r"expected the weights of a policy such as Linear's, found another"):
        policy_weights(tmp_path / "a.safetensors", torch.nn.Linear(2, 2))


def test_the_best_action_of_a_bandit_is_found():
    """Rewards of a single step, - (a - s)^2, whose best policy is a = s and whose value is then minus the variance."""
    method = make(1, 1, updates=6000, learning_rate=3e-3, discount=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        state = 2 * torch.rand(256, 1, 1, generator=generator) - 1
        acting = method.policy(exploring=True)
        action = acting(TensorDict({"observation": state[:, 0]}, [256]))["action"][:, None]
        ends = torch.ones(256, 1, 1, dtype=torch.bool)
        following = {"observation": state, "reward": -(action - state).square(), "terminated": ends, "done": ends}
        data = TensorDict({"observation": state, "action": action, "next": following}, [256, 1])
        prepared, _ = method.prepare(data, None)
        for _ in range(5):
            method.run_update(prepared)
    states = torch.linspace(-0.9, 0.9, 7)[:, None]
    chosen = method.policy()(TensorDict({"observation": states}, [7]))["action"]
    assert torch.allclose(chosen, states, atol=0.08)
    std = method.actor.log_std.exp().item()
    assert std < 0.2
    with torch.no_grad():
        assert method.value(states).mean().item() == pytest.approx(-(std**2), abs=0.03)


def test_a_compiled_update_is_the_eager_one(compiler):
    eager, compiled = make(), make(compile="default")
    prepared, _ = eager.prepare(rollout(), None)
    for _ in range(3):
        expected, found = eager.run_update(prepared), compiled.run_update(prepared)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
    for own, other in zip(compiled.parameters(), eager.parameters()):
        assert torch.allclose(own, other, atol=1e-5)
    assert math.isfinite(found["policy_loss"])
