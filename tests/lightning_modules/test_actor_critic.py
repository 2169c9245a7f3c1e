import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import IndependentNormal, TanhNormal
from torchrl.objectives import IQLLoss, SACLoss, TD3BCLoss, TD3Loss, ValueEstimators

from components.control.actor_objectives import (
    AdvantageSampled,
    AdvantageWeighted,
    BehaviourCloning,
    ReparameterisedGradient,
)
from components.control.actors import (
    ClippedGaussianActor,
    DeterministicActor,
    EntropyTemperature,
    GaussianActor,
    ScheduledNoiseActor,
)
from components.control.novelty import RandomNetworkDistillation
from components.control.pessimism import (
    DualPessimism,
    FixedPessimism,
    MinimumPessimism,
    Pessimism,
    SubsetMinimumPessimism,
)
from components.control.state_value import StateValue
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP
from lightning_modules.actor_critic import ActorCritic

CRITIC = partial(EnsembleMLP, hidden_dim=8, last_gain=1.0)
NETWORK = partial(EnsembleMLP, hidden_dim=8, last_gain=1.0)


def agent(observation_dim=5, action_dim=2, **settings) -> ActorCritic:
    torch.manual_seed(0)
    defaults = {
        "critic": CRITIC,
        "actor": partial(GaussianActor, network=NETWORK),
        "pessimism": MinimumPessimism(),
        "temperature": partial(EntropyTemperature, initial=0.3),
        "updates": 100,
    }
    made = ActorCritic([observation_dim], action_dim, **{**defaults, **settings})
    with torch.no_grad():  # targets differ from what they follow, as they do in training
        for target in (made.target_critic, *([made.target_actor] if made.target_actor else [])):
            for parameter in target.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def td3(**settings) -> ActorCritic:
    actor = partial(DeterministicActor, network=NETWORK)
    return agent(pessimism=MinimumPessimism("first"), actor=actor, temperature=None, target_actor=True, **settings)


# -- the textbooks ------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """One member of an `EnsembleMLP` as ordinary linear layers, with the keys that TorchRL expects."""

    def __init__(self, ensemble: EnsembleMLP, member: int, squash: str | None = None) -> None:
        super().__init__()
        parts = []
        for layer in ensemble:
            if hasattr(layer, "weight"):
                linear = nn.Linear(*layer.weight.shape[1:])
                linear.weight.data = layer.weight.data[member].T.clone()
                linear.bias.data = layer.bias.data[member, 0].clone()
                parts.append(linear)
            else:
                parts.append(nn.ReLU())
        self.layers, self.squash = nn.Sequential(*parts), squash

    def forward(self, *inputs):
        output = self.layers(torch.cat(inputs, -1))
        if self.squash == "gaussian":
            mean, x = output.chunk(2, -1)
            return mean, (-10 + 6 * (x.tanh() + 1)).exp()
        return output.tanh() if self.squash == "tanh" else output


def critics(ensemble: EnsembleMLP) -> list[TensorDictModule]:
    return [
        TensorDictModule(Layers(ensemble, p), ["observation", "action"], ["state_action_value"])
        for p in range(ensemble[0].weight.shape[0])
    ]


def set_targets(loss, name: str, modules: list[TensorDictModule]) -> None:
    """Give a TorchRL loss target networks of our choice."""
    params = [TensorDict.from_module(module) for module in modules]
    stacked = torch.stack(params) if len(params) > 1 else params[0]
    for key, value in stacked.items(True, True):
        getattr(loss, name).get(key).data.copy_(value.data)


def with_done(batch: TensorDict) -> TensorDict:
    batch = batch.clone()
    batch["next", "done"] = batch["next", "terminated"].clone()
    return batch


def test_sac_losses_are_those_of_torchrl(transitions):
    ours, batch = agent(), with_done(transitions(32))
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(Layers(ours.actor.network, 0, "gaussian"), ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=TanhNormal, return_log_prob=True
        ),
    )
    theirs = SACLoss(
        policy, critics(ours.critic.network), loss_function="l2", alpha_init=0.3, target_entropy=-2.0, delay_qvalue=True
    )
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    set_targets(theirs, "target_qvalue_network_params", critics(ours.target_critic.network))
    torch.manual_seed(1)
    expected = theirs(batch.clone())

    torch.manual_seed(1)
    critic_loss, _, _ = ours.critic_loss(batch["observation"], batch["action"], ours.target(batch))
    actor_loss, metrics = ours.actor_loss(batch["observation"], batch["action"])
    # TorchRL leaves out the half of the squared error.
    torch.testing.assert_close(2 * critic_loss, expected["loss_qvalue"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actor_loss, expected["loss_actor"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.temperature.loss(-metrics["entropy"]), expected["loss_alpha"], rtol=1e-5, atol=1e-5)


def test_td3_losses_are_those_of_torchrl(transitions):
    ours, batch = td3(), with_done(transitions(32))
    actor = TensorDictModule(Layers(ours.actor.network, 0, "tanh"), ["observation"], ["action"])
    theirs = TD3Loss(
        actor,
        critics(ours.critic.network),
        action_spec=Bounded(-1, 1, (2,)),
        loss_function="l2",
        policy_noise=0.2,
        noise_clip=0.5,
        delay_actor=True,
    )
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    set_targets(theirs, "target_qvalue_network_params", critics(ours.target_critic.network))
    target_actor = TensorDictModule(Layers(ours.target_actor.network, 0, "tanh"), ["observation"], ["action"])
    set_targets(theirs, "target_actor_network_params", [target_actor])
    torch.manual_seed(1)
    expected = theirs(batch.clone())

    torch.manual_seed(1)
    critic_loss, _, _ = ours.critic_loss(batch["observation"], batch["action"], ours.target(batch))
    actor_loss, _ = ours.actor_loss(batch["observation"], batch["action"])
    torch.testing.assert_close(2 * critic_loss, expected["loss_qvalue"].sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actor_loss, expected["loss_actor"], rtol=1e-5, atol=1e-5)


CLONING = partial(ClippedGaussianActor, network=NETWORK, std=1.0, learned=True)
IQL = AdvantageWeighted(1 / 3, "exp", advantage="state", over_batch="mean", over_action="sum")


def iql(**settings) -> ActorCritic:
    """In the form of its paper and of CORL."""
    value = partial(StateValue, network=NETWORK, next_value="before")
    return agent(**{"actor": CLONING, "temperature": None, "objective": IQL, "value": value, **settings})


def test_iql_losses_are_those_of_torchrl(transitions):
    ours, batch = iql(), with_done(transitions(32))
    with torch.no_grad():
        ours.actor.log_std += torch.tensor([0.3, -0.5])
        ours.value.network[-1].bias += 0.5  # advantages of both signs
    gaussian = Layers(ours.actor.network, 0, "tanh")
    scale = TensorDictModule(lambda mean: ours.actor.log_std.exp().expand_as(mean), ["loc"], ["scale"])
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(gaussian, ["observation"], ["loc"]),
        scale,
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=IndependentNormal),
    )
    value = TensorDictModule(Layers(ours.value.network, 0), ["observation"], ["state_value"])
    theirs = IQLLoss(policy, critics(ours.critic.network), value, loss_function="l2", temperature=3.0, expectile=0.7)
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    set_targets(theirs, "target_qvalue_network_params", critics(ours.target_critic.network))
    expected = theirs(batch.clone())

    observation, action = batch["observation"], batch["action"]
    advantage = ours.advantages(observation, action)
    assert 0.1 < (advantage > 0).float().mean() < 0.9
    critic_loss, _, _ = ours.critic_loss(observation, action, ours.target(batch))
    actor_loss, _ = ours.actor_loss(observation, action, advantage.detach())
    torch.testing.assert_close(2 * critic_loss, expected["loss_qvalue"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actor_loss, expected["loss_actor"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.value.loss(advantage), expected["loss_value"], rtol=1e-5, atol=1e-5)


def test_td3_bc_losses_are_those_of_torchrl(transitions):
    objective = ReparameterisedGradient(value_weight=2.5, behaviour_cloning=1.0)
    ours, batch = td3(objective=objective), with_done(transitions(32))
    actor = TensorDictModule(Layers(ours.actor.network, 0, "tanh"), ["observation"], ["action"])
    theirs = TD3BCLoss(
        actor, critics(ours.critic.network), action_spec=Bounded(-1, 1, (2,)), loss_function="l2", alpha=2.5
    )
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    set_targets(theirs, "target_qvalue_network_params", critics(ours.target_critic.network))
    target_actor = TensorDictModule(Layers(ours.target_actor.network, 0, "tanh"), ["observation"], ["action"])
    set_targets(theirs, "target_actor_network_params", [target_actor])
    torch.manual_seed(1)
    expected = theirs(batch.clone())

    torch.manual_seed(1)
    critic_loss, _, _ = ours.critic_loss(batch["observation"], batch["action"], ours.target(batch))
    actor_loss, _ = ours.actor_loss(batch["observation"], batch["action"])
    torch.testing.assert_close(2 * critic_loss, expected["loss_qvalue"].sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actor_loss, expected["loss_actor"], rtol=1e-5, atol=1e-5)


def test_half_pessimism_with_two_critics_is_sac(transitions):
    batch, found = transitions(32), []
    for pessimism in (MinimumPessimism(), FixedPessimism(0.5)):
        made = agent(pessimism=pessimism)
        torch.manual_seed(1)
        metrics = [made.update(batch) for _ in range(3)]
        found.append((made.critic.state_dict(), made.actor.state_dict(), metrics[-1]["critic_loss"]))
    torch.testing.assert_close(found[0], found[1])


# -- the target ---------------------------------------------------------------------------------------------------


def test_terminations_stop_the_bootstrap_and_truncations_do_not(transitions):
    made, batch = agent(), transitions(32)
    batch["next", "truncated"] = torch.ones(32, 1, dtype=torch.bool)
    target = made.target(batch)
    ended = batch["next", "terminated"]
    assert ended.any()
    assert not ended.all()
    assert torch.equal(target[ended], batch["next", "reward"][ended])
    assert (target != batch["next", "reward"])[~ended].all()
    assert not target.requires_grad


def test_n_step_targets_are_discounted_by_their_steps(transitions):
    made, batch = td3(), transitions(32)
    batch["next", "terminated"] = torch.zeros(32, 1, dtype=torch.bool)
    made.actor.target_std = made.target_actor.target_std = 0.0
    one = made.target(batch) - batch["next", "reward"]
    batch["steps_to_next_obs"] = torch.arange(32.0)[:, None]
    many = made.target(batch) - batch["next", "reward"]
    torch.testing.assert_close(many, one * 0.99 ** (torch.arange(32.0)[:, None] - 1))


@pytest.mark.parametrize("quantiles", [1, 7])
@pytest.mark.parametrize("critic", [CRITIC, partial(EnsembleResidualMLP, hidden_dim=8)])
@pytest.mark.parametrize(
    "pessimism",
    [
        MinimumPessimism,
        SubsetMinimumPessimism,
        FixedPessimism,
        partial(FixedPessimism, uncertainty="std"),
        DualPessimism,
    ],
)
def test_every_combination_learns_and_has_the_shapes_it_says(transitions, pessimism, critic, quantiles):
    made, batch = agent(pessimism=pessimism(), critic=critic, members=4, quantiles=quantiles), transitions(32)
    assert made.target(batch).shape == (32, quantiles)
    before = copy.deepcopy(made.state_dict())
    metrics = made.update(batch)
    assert all(value.isfinite() and value.shape == () for value in metrics.values())
    changed = {name.split(".")[0] for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    learned = {"pessimism"} if pessimism is DualPessimism else set()
    assert changed == {"critic", "target_critic", "actor", "temperature"} | learned
    mean, penalised = made.values(batch["observation"], batch["action"])
    assert mean.shape == penalised.shape == (32,)


# -- the penalty --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "direction"), [(10.0, 1), (-10.0, -1)])
def test_targets_that_are_too_high_raise_the_penalty_and_too_low_ones_lower_it(transitions, offset, direction):
    dual = DualPessimism(0.5)
    made = agent(pessimism=dual, members=3, target_rate=0.0)
    with torch.no_grad():
        made.target_critic.network[-1].bias += offset
    for _ in range(5):
        made.update(transitions(32))
    assert direction * (dual.beta.item() - 0.5) > 0
    assert dual.actor_beta == dual.beta


def test_beta_is_not_learned_through_the_target(transitions):
    made = agent(pessimism=DualPessimism(0.5), members=3)
    loss, _, _ = made.critic_loss(transitions()["observation"], transitions()["action"], made.target(transitions()))
    assert torch.autograd.grad(loss, made.pessimism.beta, allow_unused=True) == (None,)


def test_one_update_is_these_steps_in_this_order(transitions):
    """Critics; beta by the errors before they moved; the actor with the new critics and beta; then the targets."""
    made = agent(
        pessimism=DualPessimism(0.4),
        members=3,
        temperature=None,
        actor=partial(DeterministicActor, network=NETWORK, target_std=0.0),
        actor_learning_rate=1e-2,
        critic_learning_rate=1e-2,
        pessimism_learning_rate=0.2,
        target_rate=0.1,
    )
    other, batch = copy.deepcopy(made), transitions(32)
    made.update(batch)

    def adam(parameters, loss, **settings):
        optimizer = torch.optim.Adam(parameters, **settings)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        optimizer.step()

    seen, action = batch["observation"], batch["action"]
    with torch.no_grad():
        after = batch["next", "observation"]
        q = other.target_critic(after, other.actor.act(after))
        pairs = sum((q[i] - q[j]).abs() for i in range(3) for j in range(3)) / 6
        going = 1 - batch["next", "terminated"].float()
        target = batch["next", "reward"] + 0.99 * going * (q.mean(0) - 0.4 * pairs)
    errors = other.critic(seen, action) - target
    adam(list(other.critic.parameters()), 0.5 * errors.square().sum(0).mean(), lr=1e-2)
    beta = torch.tensor(0.4, requires_grad=True)
    adam([beta], beta * errors.detach().mean(), lr=0.2, betas=(0.5, 0.999), eps=1e-7)
    q = other.critic(seen, other.actor.act(seen))
    pairs = sum((q[i] - q[j]).abs() for i in range(3) for j in range(3)) / 6
    adam(list(other.actor.parameters()), -(q.mean(0) - beta.detach() * pairs).mean(), lr=1e-2)
    torch.testing.assert_close(made.pessimism.beta.detach(), beta.detach())
    assert abs(beta.item() - 0.4) > 0.1
    for network in ("critic", "actor"):
        torch.testing.assert_close(getattr(made, network).state_dict(), getattr(other, network).state_dict())
    for moved, old, new in zip(
        made.target_critic.parameters(), other.target_critic.parameters(), other.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(moved, 0.9 * old + 0.1 * new.detach())


def test_rewards_without_their_last_dimension_do_not_broadcast(transitions):
    batch = transitions(32)
    flat = batch["next", "reward"][:, 0]
    batch["next"] = TensorDict({**batch["next"], "reward": flat}, [32])
    with pytest.raises(AssertionError):
        agent().update(batch)


class Halved(Pessimism):
    """A rule of somebody else's: it learns how much of the first critic to believe."""

    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5), requires_grad=learned)
        self.steps = 0

    def target(self, q):
        return self.share.detach() * q[0]

    def actor(self, q):
        return self.target(q).mean(-1)

    def loss(self, td_error):
        return self.share * td_error.mean()

    def stepped(self):
        self.steps += 1


def test_any_rule_with_parameters_is_learned(transitions):
    made, fixed = agent(pessimism=Halved()), agent(pessimism=Halved(learned=False))
    for one in (made, fixed):
        one.update(transitions(32))
    assert made.pessimism.share.item() != 0.5
    assert (made.pessimism.steps, fixed.pessimism.steps) == (1, 0)
    with pytest.raises(ValueError, match="members=1: expected at least 2"):
        agent(pessimism=Halved(), members=1)


@pytest.mark.parametrize(
    ("use", "shape"), [("target", r"\[32, 1\], found \[32\]"), ("actor", r"\[32\], found \[32, 1\]")]
)
def test_rules_that_would_broadcast_are_named(monkeypatch, transitions, use, shape):
    made = agent(pessimism=FixedPessimism())
    other = {"target": "actor", "actor": "target"}[use]
    monkeypatch.setattr(made.pessimism, use, getattr(FixedPessimism(), other))
    with pytest.raises(ValueError, match=f"FixedPessimism.{use}: expected a value of shape {shape}"):
        made.update(transitions(32))


# -- the schedule -------------------------------------------------------------------------------------------------


def test_actor_pessimism_and_targets_wait_for_their_turn(transitions):
    made = agent(pessimism=DualPessimism(), actor_every=2, pessimism_every=3, targets_every=6)
    moved = []
    for _ in range(6):
        before = copy.deepcopy(made.state_dict())
        made.run_update(transitions(32))
        made.updates += 1
        after = made.state_dict()
        moved.append({n.split(".")[0] for n in after if not torch.equal(after[n], before[n])})
    assert ["actor" in names for names in moved] == [False, True, False, True, False, True]
    assert ["pessimism" in names for names in moved] == [False, False, True, False, False, True]
    assert ["target_critic" in names for names in moved] == [False] * 5 + [True]
    assert all("critic" in names for names in moved)


def test_policies_are_evaluated_and_then_improved_against_frozen_critics(transitions):
    made = agent(pessimism=DualPessimism(), members=3, actor_every=2, policy_evaluation_updates=2)
    moved = []
    for _ in range(4):
        before = copy.deepcopy(made.state_dict())
        metrics = made.run_update(transitions(32))
        made.updates += 1
        after = made.state_dict()
        moved.append({n.split(".")[0] for n in after if not torch.equal(after[n], before[n])})
        assert ("critic_loss" in metrics) == ("actor_loss" not in metrics)
    assert moved[0] == moved[1] == {"critic", "target_critic", "pessimism"}
    assert moved[2] == moved[3] == {"actor", "temperature"}


def test_compiled_updates_are_the_eager_ones(compiler, transitions):
    losses = []
    critic = partial(EnsembleResidualMLP, hidden_dim=8)
    for mode in (None, "default"):
        made = agent(pessimism=DualPessimism(), critic=critic, members=3, actor_every=2, compile=mode)
        torch.manual_seed(1)
        found = []
        for step in range(20):
            metrics = made.run_update(transitions(32, seed=step))
            made.updates += 1
            found.append(metrics["critic_loss"].item())
        losses.append(found)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_cuda_graphs_with_and_without_the_actor_learn_as_eager_updates_do(transitions):
    weights = []
    critic = partial(EnsembleResidualMLP, hidden_dim=8)
    for mode in (None, "cudagraphs"):
        made = agent(pessimism=DualPessimism(), critic=critic, members=3, actor_every=2, compile=mode).cuda()
        torch.manual_seed(1)
        for step in range(40):
            metrics = made.run_update(transitions(32, seed=step).cuda())
            made.updates += 1
            if step in (19, 39):  # both graphs have been captured by then
                weights.append(
                    nn.utils.parameters_to_vector([*made.critic.parameters(), *made.actor.parameters()]).detach()
                )
        assert all(value.isfinite() for value in metrics.values())
        assert made.pessimism.beta.item() != 0.5
    eager, captured = weights[1] - weights[0], weights[3] - weights[2]
    # Other random numbers, but the same rule on the same data: replays go on learning, as fast and the same way.
    assert 0.5 < captured.norm() / eager.norm() < 2
    assert torch.cosine_similarity(eager, captured, dim=0) > 0.3


@pytest.mark.parametrize(
    ("before", "own", "beta", "actor_beta"),
    [
        (FixedPessimism(0.5), FixedPessimism(0.2), 0.2, 0.2),
        (DualPessimism(0.5), DualPessimism(0.2), 0.5, 0.5),
        (DualPessimism(0.5, actor_beta=0.9), DualPessimism(0.2, actor_beta=0.0), 0.5, 0.0),
        (DualPessimism(0.5, actor_beta=0.9), DualPessimism(0.2), 0.5, 0.5),
        (DualPessimism(0.5, shift=-0.5), DualPessimism(0.2), 0.5, 0.5),
        (DualPessimism(0.5), DualPessimism(0.2, shift=-0.5), 0.5, 0.0),
    ],
)
def test_another_run_gives_what_is_learned_and_not_what_is_set(before, own, beta, actor_beta):
    actor = partial(ScheduledNoiseActor, network=NETWORK, anneal_steps=10)
    done, made = (agent(actor=actor, pessimism=pessimism, target_actor=True) for pessimism in (before, own))
    done.advance(10)
    for parameter in done.actor.parameters():
        parameter.data += 1
    made.begin_from({"state_dict": done.state_dict()})
    for found, expected in zip(made.actor.parameters(), done.actor.parameters()):
        assert torch.equal(found, expected)
    assert (made.actor.std.item(), made.target_actor.std.item()) == (1.0, 1.0)
    assert (made.pessimism.beta.item(), made.pessimism.actor_beta.item()) == pytest.approx((beta, actor_beta))


def test_gradient_of_the_actor_is_clipped(transitions):
    made = agent(actor_max_norm=1e-3, actor_learning_rate=1.0)
    made.actor_optimizer = made.register_optimizer(torch.optim.SGD(made.actor.parameters(), lr=1.0))
    before = nn.utils.parameters_to_vector(made.actor.parameters()).detach()
    made.update(transitions(32))
    step = nn.utils.parameters_to_vector(made.actor.parameters()).detach() - before
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_diverging_critics_stop_the_run():
    made = agent(value_limit=100.0)
    made.tally(("q_mean",), torch.tensor([-1e3]), 1)
    with pytest.raises(ValueError, match=r"train/q_mean became -1e\+03 by update 0: the critics diverge"):
        made.training_metrics()


# -- policies -----------------------------------------------------------------------------------------------------


def test_policies():
    made = agent()
    seen = TensorDict({"observation": torch.randn(6, 5)}, [6])
    act = made.policy()
    assert torch.equal(act(seen.clone())["action"], act(seen.clone())["action"])
    explore = made.policy(exploring=True)
    assert not torch.equal(explore(seen.clone())["action"], explore(seen.clone())["action"])
    valued = made.valued_policy()(seen.clone())
    expected = made.actor(seen["observation"]).log_prob(valued["action"])
    torch.testing.assert_close(valued["action_log_prob"], expected, rtol=1e-3, atol=1e-3)


# -- priorities ---------------------------------------------------------------------------------------------------


def sampled(**settings) -> ActorCritic:
    actor = partial(ClippedGaussianActor, network=NETWORK)
    return agent(actor=actor, temperature=None, **{"objective": AdvantageSampled(0.3), **settings})


def with_priorities(batch: TensorDict, drawn: TensorDict) -> TensorDict:
    drawn["index"], batch["index"] = torch.arange(100, 100 + len(drawn)), torch.arange(len(batch))
    batch["prioritised"] = drawn
    return batch


def test_the_actor_clones_drawn_actions_and_all_rows_get_new_priorities(transitions):
    """Critics learn from the batch, the actor from the rows beside it; then logits are advantages over temperature."""
    made, cloning = sampled(value_learning_rate=1e-2), sampled(objective=BehaviourCloning())
    drawn = transitions(32, seed=1)
    batch = with_priorities(transitions(32), drawn)
    torch.manual_seed(1)
    metrics = made.update(batch)
    torch.manual_seed(1)
    cloning.update(transitions(32), actor=False)
    loss, _ = cloning.actor_loss(drawn["observation"], drawn["action"])
    cloning.minimise(loss, cloning.actor_optimizer)
    for name in ("critic", "actor"):
        torch.testing.assert_close(getattr(made, name).state_dict(), getattr(cloning, name).state_dict())
    rows = torch.cat([drawn, batch.exclude("prioritised")])
    q = made.critic(rows["observation"], rows["action"]).mean(-1)
    value = made.critic(rows["observation"], made.actor(rows["observation"]).mean).mean(-1).min(0).values
    assert metrics["priorities", "index"].tolist() == [*range(100, 132), *range(32)]
    logit = metrics["priorities", "logit"]
    # the policy's value is that of one action with noise, which is drawn here again with almost none
    made.actor.std = 1e-6
    again = made._prioritise(rows)[0]["logit"]
    torch.testing.assert_close(again, (q.mean(0) - value).detach() / 0.3, rtol=1e-3, atol=1e-3)
    assert logit.shape == again.shape
    assert (logit - again).abs().mean() < 1


def test_priorities_over_a_state_value_are_its_advantages(transitions):
    made = sampled(value=partial(StateValue, network=NETWORK), objective=AdvantageSampled(0.5, advantage="state"))
    drawn = transitions(16, seed=1)
    logit = made.update(with_priorities(transitions(16), drawn))["priorities", "logit"]
    torch.testing.assert_close(logit[:16], made.advantages(drawn["observation"], drawn["action"]).detach() / 0.5)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            sampled(),
            r"expected one that draws by priorities, such as datamodule=offline, for this module, found object",
        ),
        (td3(critic_cloning=0.1), r"expected one that knows the actions that come next, such as datamodule=offline"),
        ("hindsight", r"expected one that knows what follows each transition, such as datamodule=offline"),
    ],
)
def test_what_data_have_to_offer_is_checked_before_training(made, message, small_agent):
    made = small_agent(hindsight_probability=0.5) if made == "hindsight" else made
    made.trainer = SimpleNamespace(datamodule=object())
    with pytest.raises(ValueError, match=message):
        made.on_fit_start()


def test_what_would_have_no_effect_is_refused(transitions):
    with pytest.raises(
        ValueError, match=r"critic_cloning=0.1: expected null where critics bootstrap from module.value"
    ):
        td3(critic_cloning=0.1, value=partial(StateValue, network=NETWORK))
    batch = transitions(8)
    batch["next", "action"] = batch["action"]
    with pytest.raises(ValueError, match=r"critic_cloning=0.1: expected null where data say the next action"):
        td3(critic_cloning=0.1).update(batch)
    novel = agent(intrinsic_reward=partial(RandomNetworkDistillation, features=4, hidden_dim=8))
    assert all(value.isfinite() for value in novel.update(transitions(8)).values())
    batch = transitions(8)
    batch["steps_to_next_obs"] = torch.ones(8, 1)
    with pytest.raises(ValueError, match=r"module.intrinsic_reward: expected datamodule.n_step=1"):
        novel.update(batch)


@pytest.mark.slow
def test_compiled_updates_give_the_same_priorities(compiler, transitions):
    given = []
    for mode in (None, "default"):
        made, found = sampled(compile=mode), []
        for step in range(3):
            batch = with_priorities(transitions(16, seed=step), transitions(16, seed=step + 10))
            torch.manual_seed(step)
            found.append(made.run_update(batch)["priorities", "logit"])
        given.append(torch.stack(found))
    torch.testing.assert_close(*given, rtol=1e-4, atol=1e-4)
