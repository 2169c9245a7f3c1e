"""The losses of presets, written out as the published codes that they are named after have them."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.nn import functional as F

from tests.test_configs import check_parts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = ("mood_awac", "mood_iql", "mood_td3bc", "corl_iql", "corl_awac", "corl_td3bc", "rebrac")
STD, CLIP = 0.2, 0.3


@pytest.fixture
def agent(transitions):
    """An agent of a preset with narrow networks, a batch, and the losses of its parts before anything is stepped."""

    def make(*overrides: str):
        narrow = ["module.critic.hidden_dim=8", "module.actor.network.hidden_dim=8"]
        narrow += ["module.value.network.hidden_dim=8"] * any("iql" in each for each in overrides)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", ["experiment=offline", "datamodule.dataset.path=x.npz", *overrides, *narrow])
        check_parts(config)
        torch.manual_seed(0)
        made = instantiate(config.module, observation_shape=[5], action_dim=2)
        for network in (made.target_critic, made.target_actor):
            for parameter in () if network is None else network.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        return made, transitions(64)

    return make


def losses(made, batch) -> dict[str, torch.Tensor]:
    """Of one update: what every optimiser was given, in their order."""
    given = {}
    names = {id(getattr(made, f"{part}_optimizer", None)): part for part in ("value", "critic", "actor")}
    step = made.minimise

    def minimise(loss, optimizer, max_norm=None):
        given[names[id(optimizer)]] = loss.detach()
        step(loss, optimizer, max_norm)

    made.minimise = minimise
    torch.manual_seed(1)
    made.update(batch)
    return given


def stepped(made, batch, **due):
    """The agent as it is after some parts of the update."""
    other = copy.deepcopy(made)
    torch.manual_seed(1)
    other.update(batch, **{"actor": False, "targets": False, **due})
    return other


def pessimistic(q: torch.Tensor) -> torch.Tensor:
    """[2, B, 1] -> [B]: the mean less half of the difference."""
    return (q.mean(0) - 0.5 * (q[0] - q[1]).abs()).squeeze(-1)


def bounded(mean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return mean + torch.maximum(torch.minimum(noise, 1 - mean), -1 - mean)


def transition(batch):
    going = 1 - batch["next", "terminated"].float().squeeze(-1)
    return (
        batch["observation"],
        batch["action"],
        batch["next", "reward"].squeeze(-1),
        batch["next", "observation"],
        0.99 * going,
    )


def squares(q: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each critic, their mean."""
    return (q.squeeze(-1) - y).square().mean(-1)


def mood_critic_loss(made, batch) -> torch.Tensor:
    o, a, r, after, discount = transition(batch)
    with torch.no_grad():
        torch.manual_seed(1)
        mean = made.actor.act(after)
        y = r + discount * pessimistic(
            made.target_critic(after, bounded(mean, (STD * torch.randn(mean.shape)).clamp(-CLIP, CLIP)))
        )
    return 0.5 * squares(made.critic(o, a), y).sum()


def mood_cloning_loss(made, o, a) -> torch.Tensor:
    """Of AWAC and IQL alike; the next draws are those of the policy's actions."""
    mean = made.actor.act(o)
    x = bounded(mean, STD * torch.randn(mean.shape))
    advantage = made.critic(o, a).mean(0).squeeze(-1) - pessimistic(made.critic(o, x))
    weight = advantage.softmax(0).detach()
    log_prob = (-0.5 * ((a - mean) / STD).square() - math.log(STD) - 0.5 * math.log(2 * math.pi)).mean(-1)
    return -(weight * log_prob).mean()


def test_mood_awac(agent):
    made, batch = agent("preset=mood_awac")
    after_critics, expected = stepped(made, batch), mood_critic_loss(made, batch)
    actor = mood_cloning_loss(after_critics, *transition(batch)[:2])  # with the noise that comes after the target's
    given = losses(made, batch)
    assert list(given) == ["critic", "actor"]
    torch.testing.assert_close(given["critic"], expected.detach())
    torch.testing.assert_close(given["actor"], actor.detach())


def test_mood_td3bc(agent):
    made, batch = agent("preset=mood_td3bc")
    o, a, *_ = transition(batch)
    after_critics, expected = stepped(made, batch), mood_critic_loss(made, batch)
    mean = after_critics.actor.act(o)
    x = bounded(mean, STD * torch.randn(mean.shape))
    value = pessimistic(after_critics.critic(o, x))
    actor = -value.mean() + 0.4 * value.abs().mean().detach() * (x - a).square().mean()
    given = losses(made, batch)
    assert list(given) == ["critic", "actor"]
    torch.testing.assert_close(given["critic"], expected.detach())
    torch.testing.assert_close(given["actor"], actor.detach())


def test_mood_iql(agent):
    made, batch = agent("preset=mood_iql")
    o, a, r, after, discount = transition(batch)
    with torch.no_grad():
        difference = pessimistic(made.target_critic(o, a)) - made.value(o)
    value = ((0.7 - (difference <= 0).float()).abs() * difference.square()).mean()
    all_but_the_actor = stepped(made, batch)
    with torch.no_grad():
        y = r + discount * all_but_the_actor.value(after)  # V after its own step
    critic = 0.5 * squares(made.critic(o, a), y).sum()
    torch.manual_seed(1)
    actor = mood_cloning_loss(all_but_the_actor, o, a)
    given = losses(made, batch)
    assert list(given) == ["value", "critic", "actor"]
    for name, expected in {"value": value, "critic": critic, "actor": actor}.items():
        torch.testing.assert_close(given[name], expected.detach())


def test_corl_iql(agent):
    made, batch = agent("preset=corl_iql")
    o, a, r, after, discount = transition(batch)
    with torch.no_grad():
        difference = made.target_critic(o, a).amin(0).squeeze(-1) - made.value(o)
        y = r + discount * made.value(after)  # V before its own step
        weight = (3.0 * difference).exp().clamp(max=100.0)
        value = ((0.7 - (difference < 0).float()).abs() * difference.square()).mean()
        critic = squares(made.critic(o, a), y).sum() / 2
        normal = torch.distributions.Normal(made.actor.network(o)[0].tanh(), made.actor.log_std.clamp(-20, 2).exp())
        actor = (weight * -normal.log_prob(a).sum(-1)).mean()
    given = losses(made, batch)
    assert list(given) == ["value", "critic", "actor"]
    for name, expected in {"value": value, "critic": critic, "actor": actor}.items():
        torch.testing.assert_close(given[name], expected)
    made.updates = made.total_updates // 2
    assert made.learning_rate_factors()[1] == pytest.approx(0.5)  # of the actor, along a cosine
    assert made.learning_rate_factors()[0] == made.learning_rate_factors()[2] == 1


def test_corl_awac(agent):
    made, batch = agent("preset=corl_awac")
    o, a, r, after, discount = transition(batch)
    std = made.actor.log_std.detach().exp()
    after_critics = stepped(made, batch)
    with torch.no_grad():
        torch.manual_seed(1)
        sampled = (made.actor.network(after)[0] + std * torch.randn(64, 2)).clamp(-1, 1)
        y = r + discount * made.target_critic(after, sampled).amin(0).squeeze(-1)
        critic = sum(F.mse_loss(q.squeeze(-1), y) for q in made.critic(o, a))
        mean = made.actor.network(o)[0]
        sampled = (mean + std * torch.randn(64, 2)).clamp(-1, 1)
        least = [after_critics.critic(o, each).amin(0).squeeze(-1) for each in (a, sampled)]
        weight = ((least[0] - least[1]) / 0.3333).exp().clamp(max=100.0)
        actor = (weight * -torch.distributions.Normal(mean, std).log_prob(a).sum(-1)).mean()
    given = losses(made, batch)
    assert list(given) == ["critic", "actor"]
    torch.testing.assert_close(given["critic"], critic)
    torch.testing.assert_close(given["actor"], actor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["corl_td3bc", "rebrac"])
def test_deterministic_ones(preset, agent):
    made, batch = agent(f"preset={preset}")
    o, a, r, after, discount = transition(batch)
    batch["next", "data_action"] = batch["action"].roll(-1, 0)
    batch["next", "data_action"][5] = torch.nan  # an episode's last
    after_critics = stepped(made, batch)
    with torch.no_grad():
        torch.manual_seed(1)
        mean = made.target_actor.network(after)[0].tanh()
        sampled = (mean + (0.2 * torch.randn(64, 2)).clamp(-0.5, 0.5)).clamp(-1, 1)
        y = made.target_critic(after, sampled).amin(0).squeeze(-1)
        if preset == "rebrac":
            distance = (sampled - batch["next", "data_action"]).square().sum(-1)
            distance[5] = 0.0
            y = y - 0.01 * distance
        y = r + discount * y
        critic = sum(F.mse_loss(q.squeeze(-1), y) for q in made.critic(o, a))
        pi = made.actor.network(o)[0].tanh()
        q = after_critics.critic(o, pi).squeeze(-1)
        if preset == "rebrac":
            q = q.amin(0)
            actor = (0.01 * (pi - a).square().sum(-1) - q / q.abs().mean()).mean()
        else:
            actor = -(2.5 / q[0].abs().mean()) * q[0].mean() + F.mse_loss(pi, a)
    given = losses(made, batch)
    assert list(given) == ["critic", "actor"]
    torch.testing.assert_close(given["critic"], critic)
    torch.testing.assert_close(given["actor"], actor)
    made.updates = 0
    assert made.schedule() == {"critic": True, "actor": False, "pessimism": True, "targets": False}


@pytest.mark.parametrize("module", ["asac", "bc"])
def test_the_common_part_serves_those_that_need_no_other(module, agent):
    made, _ = agent("preset=mood_code", f"module={module}")
    assert made.evaluation_samples == (1, 50)
    assert made.actor.std == 0.2
    assert made.critic.network[-1].weight[0].norm().item() == pytest.approx(math.sqrt(2))


def test_networks_with_blocks_take_the_places_of_simple_ones(agent, transitions):
    kinds = ["module/critic=residual", "module/network@module.actor.network=residual"]
    made, batch = agent("preset=mood_awac", *kinds)
    for network, gain in ((made.critic.network, math.sqrt(2)), (made.actor.network, 1.0)):
        assert type(network).__name__ == "EnsembleResidualMLP"
        assert network[-1].weight[0].norm().item() == pytest.approx(gain * math.sqrt(network[-1].weight.shape[-1]))
    assert all(value.isfinite() for value in made.update(batch).values())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_evaluated_on_stored_transitions(preset, agent):
    made, batch = agent(f"preset={preset}")
    if made.next_data_actions:
        batch["next", "data_action"] = batch["action"]
    assert all(value.isfinite() for value in made.fit(batch).values())


def test_state_values_may_have_blocks(agent):
    made, batch = agent("preset=mood_iql", "module/network@module.value.network=residual")
    weight = made.value.network[0].weight[0]
    assert not torch.allclose(
        weight @ weight.T, 2 * torch.eye(5), atol=0.1
    )  # PyTorch's own start, not an orthogonal one
    assert weight.abs().max() <= 1 / math.sqrt(5)
    assert all(value.isfinite() for value in made.update(batch).values())


def test_every_preset_is_tried():
    found = {path.stem for path in (CONFIGS / "preset").glob("*.yaml")}
    assert {name for name in found if name.startswith(("mood", "corl", "rebrac"))} == {*PRESETS, "mood_code"}
