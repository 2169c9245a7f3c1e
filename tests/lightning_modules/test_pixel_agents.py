"""DrQ-v2 and A-LIX: the actor-critic with an encoder."""

import copy
import io
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from components.control.actors import ScheduledNoiseActor
from components.control.pessimism import MinimumPessimism
from components.networks.encoders import FeatureTrunk, PixelEncoder, RandomShift
from components.networks.ensemble import EnsembleMLP
from components.networks.signal_mixing import SignalMixing, discontinuity_score
from lightning_modules.actor_critic import ActorCritic
from lightning_modules.base import set_random_state

SHAPE = (9, 20, 20)
NETWORK = partial(EnsembleMLP, hidden_dim=8, last_gain=1.0)


def agent(mixing=None, augmentation=None, **settings) -> ActorCritic:
    torch.manual_seed(0)
    defaults = {
        "critic": NETWORK,
        "actor": partial(ScheduledNoiseActor, network=NETWORK, initial_std=0.5, anneal_steps=100),
        "pessimism": MinimumPessimism(),
        "encoder": partial(PixelEncoder, channels=4, augmentation=augmentation, mixing=mixing),
        "trunk": partial(FeatureTrunk, feature_dim=6),
        "critic_learning_rate": 1e-2,
        "encoder_learning_rate": 3e-3,
        "actor_learning_rate": 1e-2,
        "critic_loss_weight": 2.0,
        "target_rate": 0.1,
        "discount": 0.9,
        "updates": 100,
    }
    made = ActorCritic(SHAPE, 2, **{**defaults, **settings})
    with torch.no_grad():  # the target differs from what it follows, as it does in training
        for parameter in made.target_critic.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


class Reconstructing(PixelEncoder):
    """An encoder with a loss of its own."""

    def __init__(self, observation_shape, **settings) -> None:
        super().__init__(observation_shape, **settings)
        self.decoder = nn.Linear(self.features, 7)

    def loss(self, observation, features):
        return 0.5 * (self.decoder(features) - observation.flatten(1)[:, :7] / 255).square().mean()

    def parameter_groups(self, learning_rate):
        return [*super().parameter_groups(learning_rate), {"params": list(self.decoder.parameters()), "lr": 0.02}]


def reconstructing(**settings) -> ActorCritic:
    return agent(encoder=partial(Reconstructing, channels=4), **settings)


@pytest.fixture
def batch(transitions):
    """Three-step transitions of pictures."""
    made = transitions(16, SHAPE)
    made["steps_to_next_obs"] = torch.full((16, 1), 3.0)
    return made


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_one_update_is_these_steps_in_this_order(batch):
    """Critics, encoder and strength by the critics' loss; the actor by the new critics; then the target critics."""
    mixing = partial(SignalMixing, initial=0.4, target=0.5, learning_rate=2e-3, momentum=0.5)
    made = agent(mixing)
    other = copy.deepcopy(made)
    torch.manual_seed(5)
    metrics = made.update(batch)

    torch.manual_seed(5)
    heads, observation, action = other.critic, batch["observation"], batch["action"]
    features = other.encoder(observation)
    features.retain_grad()
    with torch.no_grad():
        after = other.encoder(batch["next", "observation"])  # in training mode too: mixed by shifts of its own
        mean = other.actor.network(after)[0].tanh()
        noise = (0.5 * torch.randn_like(mean)).clamp(-0.3, 0.3)
        following = (mean + noise).clamp(-1 + 1e-6, 1 - 1e-6)
        q = other.target_critic(after, following)
        going = 1 - batch["next", "terminated"].float()
        target = batch["next", "reward"] + 0.9**3 * going * torch.minimum(q[0], q[1])
    q = heads(features, action)
    loss = ((q[0] - target) ** 2 + (q[1] - target) ** 2).mean()  # the sum of both heads, without a half
    loss.backward()
    assert metrics["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-5)

    dual = other.encoder.mixing.duals[0]
    score = discontinuity_score(features.grad.view(16, 4, *other.encoder.feature_shape[1:]))
    assert dual.strength.grad.item() == pytest.approx(0.5 - score.item(), abs=1e-6)
    torch.optim.Adam(heads.parameters(), 1e-2).step()
    torch.optim.Adam(other.encoder.convolutions.parameters(), 3e-3).step()
    torch.optim.Adam([dual.strength], 2e-3, betas=(0.5, 0.999)).step()
    assert metrics["nd_score"].item() == pytest.approx(score.item(), rel=1e-5)

    actor_features = features.detach()
    mean = other.actor.network(actor_features)[0].tanh()
    noise = (0.5 * torch.randn_like(mean)).clamp(-0.3, 0.3)
    free = mean + noise
    chosen = free + (free.clamp(-1 + 1e-6, 1 - 1e-6) - free).detach()
    q = heads(actor_features, chosen)
    encoder_before = weights(other.encoder)
    actor_loss = -torch.minimum(q[0], q[1]).mean()
    other.actor.zero_grad()
    actor_loss.backward()
    torch.optim.Adam(other.actor.parameters(), 1e-2).step()
    assert torch.equal(weights(other.encoder), encoder_before)
    for name in ("critic", "actor", "encoder"):
        torch.testing.assert_close(weights(getattr(made, name)), weights(getattr(other, name)), atol=1e-6, rtol=1e-5)
    expected = 0.9 * weights(other.target_critic) + 0.1 * weights(heads)
    torch.testing.assert_close(weights(made.target_critic), expected)


def test_the_target_has_a_trunk_of_its_own_and_there_is_no_target_encoder():
    made = agent()
    assert "trunk.0.weight" in dict(made.target_critic.named_parameters())
    assert made.target_actor is None
    assert not [name for name, _ in made.named_parameters() if name.startswith("target") and "encoder" in name]
    assert made.critic.trunk[0].weight.shape == made.actor.network[0][0].weight.shape == (6, made.encoder.features)
    assert not torch.equal(made.critic.trunk[0].weight, made.actor.network[0][0].weight)


def test_strength_is_told_once_by_the_critics_alone(batch):
    made = agent(SignalMixing)
    strength = made.encoder.mixing.duals[0].strength
    target = made.target(batch)
    assert strength.grad is None
    features = made.encoder(batch["observation"])
    loss, _ = made.actor_loss(features.detach(), batch["action"])
    assert torch.autograd.grad(loss, strength, allow_unused=True) == (None,)
    loss, _, _ = made.critic_loss(features, batch["action"], target)
    (once,) = torch.autograd.grad(loss, strength)
    assert once.abs() < 1.2  # the target less one score, not less four
    assert not target.requires_grad


def losses(made: ActorCritic, transitions, count: int = 8) -> torch.Tensor:
    found = []
    for step in range(count):
        batch = transitions(16, SHAPE, seed=step)
        torch.manual_seed(100 + step)
        found.append(made.run_update(batch)["critic_loss"].item())
    return torch.tensor(found)


def test_mixing_of_no_strength_is_no_mixing(transitions):
    # Without noise: the draws of mixing would move those of the actor.
    quiet = {"actor": partial(ScheduledNoiseActor, network=NETWORK, initial_std=0.0, final_std=0.0)}
    expected = losses(agent(**quiet), transitions)
    for settings in ({"initial": 0.0}, {"place": "none"}):
        still = agent(partial(SignalMixing, learning_rate=0.0, **settings), **quiet)
        torch.testing.assert_close(losses(still, transitions), expected, atol=1e-4, rtol=1e-4)
    mixed = agent(partial(SignalMixing, initial=1.0, learning_rate=0.0), **quiet)
    assert (losses(mixed, transitions) - expected).abs().max() > 1e-3


def test_acting_and_valuing_are_without_regularisers(batch):
    made = agent(partial(SignalMixing, initial=1.0), RandomShift(4))
    plain = agent()
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if "mixing" not in k})
    seen = TensorDict({"observation": batch["observation"]}, [16])
    assert torch.equal(made.policy()(seen)["action"], plain.policy()(seen.clone())["action"])
    for found, expected in zip(*(one.values(batch["observation"], batch["action"]) for one in (made, plain))):
        assert torch.equal(found, expected)
    assert made.encoder.training
    assert made.training


@pytest.mark.parametrize(("adaptive", "strength"), [(True, 0.8), (False, 0.1)])
def test_another_run_gives_strengths_that_are_tuned_and_none_that_are_set(adaptive, strength):
    done, made = (agent(partial(SignalMixing, adaptive=adaptive, initial=initial)) for initial in (0.8, 0.1))
    made.begin_from({"state_dict": done.state_dict()})
    assert made.encoder.mixing.duals[0].value().item() == pytest.approx(strength)


def test_noise_falls_with_the_environment_steps(batch):
    made = agent()
    for steps, std in ((0, 0.5), (50, 0.3), (100, 0.1), (1000, 0.1)):
        made.advance(steps)
        assert made.env_steps == steps
        assert made.actor.std.item() == pytest.approx(std)
    assert made.state_dict()["actor.std"].item() == pytest.approx(0.1)  # a run goes on with it
    averaged = agent(target_actor=True)
    averaged.advance(50)
    assert averaged.target_actor.std.item() == pytest.approx(0.3)
    made.actor.std.fill_(10.0)
    features = made.encoder(batch["observation"])
    mean = made.actor.act(features)
    bootstrapped, log_prob = made.actor.bootstrap(features)
    assert ((bootstrapped - mean).abs() <= 0.3 + 1e-5).all()
    assert not log_prob.any()
    assert (made.actor.explore(features).abs() > 0.999).any()  # exploration is not clipped


def test_critics_learn_the_value_of_the_data_where_the_next_action_is_given(batch):
    made = agent()
    batch["next", "action"] = batch["action"].flip(0)
    with torch.no_grad():
        after = made.encoder(batch["next", "observation"])
        q = made.target_critic(after, batch["action"].flip(0))
    going = 1 - batch["next", "terminated"].float()
    expected = batch["next", "reward"] + 0.9**3 * going * q.min(0).values
    torch.testing.assert_close(made.target(batch), expected)


def test_compiled_updates_are_the_eager_ones(compiler, transitions):
    found = []
    for mode in (None, "default"):
        encoder = partial(Reconstructing, channels=4, mixing=SignalMixing, augmentation=RandomShift(2))
        made = agent(encoder=encoder, compile=mode)
        found.append(losses(made, transitions, 4))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_a_loss_of_the_encoders_own_is_added_to_that_of_the_critics(batch):
    made = reconstructing()
    twin = copy.deepcopy(made)
    torch.manual_seed(1)
    metrics = made.run_update(batch)
    torch.manual_seed(1)
    features = twin.encoder(batch["observation"])
    loss, _, _ = twin.critic_loss(features, batch["action"], twin.target(batch))
    drawn = twin.encoder.decoder(features) - batch["observation"].flatten(1)[:, :7] / 255
    loss += 0.5 * drawn.square().mean()
    torch.testing.assert_close(metrics["encoder_loss"], 0.5 * drawn.square().mean().detach())
    trained = [*twin.critic.parameters(), *twin.encoder.parameters()]
    for own, gradient in zip(
        (*made.critic.parameters(), *made.encoder.parameters()), torch.autograd.grad(loss, trained)
    ):
        torch.testing.assert_close(own.grad, gradient)
    for own, was in zip(made.encoder.decoder.parameters(), twin.encoder.decoder.parameters()):
        torch.testing.assert_close(
            (own - was).abs(), torch.full_like(own, 0.02), rtol=1e-3, atol=0
        )  # Adam's first step
    assert "encoder_loss" not in agent().run_update(batch)


def test_training_goes_on_bit_for_bit_from_what_is_saved(transitions):
    """With all that an encoder may have: a loss and parameters of its own, mixing whose strength moves, and shifts."""
    encoder = partial(Reconstructing, channels=4, mixing=SignalMixing, augmentation=RandomShift(2))
    batches = [transitions(16, SHAPE, seed=seed) for seed in range(4)]
    whole, resumed = agent(encoder=encoder), agent(encoder=encoder)
    losses = [whole.run_update(batch)["encoder_loss"] for batch in batches[:2]]
    saved = {
        "state_dict": whole.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in whole.configure_optimizers()],
    }
    whole.on_save_checkpoint(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    losses += [whole.run_update(batch)["encoder_loss"] for batch in batches[2:]]

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.on_load_checkpoint(saved)
    resumed.load_state_dict(saved["state_dict"])
    for optimizer, state in zip(resumed.configure_optimizers(), saved["optimizer_states"]):
        optimizer.load_state_dict(state)
    set_random_state(saved["learning_method"]["processes"][0]["random"])
    assert [resumed.run_update(batch)["encoder_loss"] for batch in batches[2:]] == losses[2:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_loss_for_each_row_is_named(batch, monkeypatch):
    monkeypatch.setattr(Reconstructing, "loss", lambda self, observation, features: features.mean(1))
    with pytest.raises(ValueError, match=r"Reconstructing\.loss: expected a value of shape \[\], found \[16\]\."):
        reconstructing().run_update(batch)


def test_policies_are_improved_on_features_without_mixing_and_shifts(batch):
    """The actor's gradient is that of features in evaluation mode; encoder and strength stay as they are."""
    made = agent(partial(SignalMixing, initial=1.0), RandomShift(2), policy_evaluation_updates=1)
    made.updates = 1
    twin = copy.deepcopy(made)
    torch.manual_seed(1)
    made.run_update(batch)
    torch.manual_seed(1)
    twin.encoder.eval()
    loss, _ = twin.actor_loss(twin.encoder(batch["observation"]).detach(), batch["action"])
    expected = torch.autograd.grad(loss, list(twin.actor.parameters()))
    for parameter, gradient in zip(made.actor.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    assert torch.equal(weights(made.encoder), weights(twin.encoder))
    assert made.encoder.training


def test_updates_in_half_precision_follow_those_in_full(transitions):
    found = []
    for half in (False, True):
        slow = {f"{part}_learning_rate": 1e-4 for part in ("critic", "encoder", "actor")}
        made = agent(SignalMixing, **slow)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(losses(made, transitions))
        assert made.encoder.mixing.duals[0].mean_score.dtype == torch.float32
        found.append(made.encoder.mixing.duals[0].mean_score)
    torch.testing.assert_close(found[2], found[0], rtol=0.1, atol=0.1)
    torch.testing.assert_close(found[3], found[1], rtol=0.1, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_cuda_graphs_learn_and_keep_the_strength_moving(transitions, half):
    made = agent(SignalMixing, RandomShift(2), compile="cudagraphs").cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        for step in range(30):
            metrics = made.run_update(transitions(16, SHAPE, seed=step).cuda())
    assert all(value.isfinite() for value in metrics.values())
    assert made.encoder.mixing.duals[0].value().item() != 0.5
    assert 0 < metrics["nd_score"] < 3


def test_feature_gradient_is_that_of_the_loss(batch):
    made = agent()
    made.eval()
    torch.manual_seed(3)
    gradient = made.feature_gradient(batch)
    assert gradient.shape == made.encoder.feature_shape
    torch.manual_seed(3)
    features = made.encoder(batch["observation"]).detach().requires_grad_()
    loss, _, _ = made.critic_loss(features, batch["action"], made.target(batch))
    loss.backward()
    torch.testing.assert_close(gradient.flatten(), features.grad.mean(0), atol=1e-7, rtol=1e-4)


def test_fit_compares_critics_with_their_targets_and_with_returns(batch):
    made = agent().eval()
    batch["next", "action"] = batch["action"]
    batch["return"] = batch["next", "reward"]
    scores = made.fit(batch)
    q, target = made.critic(made.encoder(batch["observation"]), batch["action"]), made.target(batch)
    mean = q.mean((0, 2))
    assert scores["td_loss"].item() == pytest.approx((q - target).square().mean().item(), rel=1e-5)
    assert scores["q_std"].item() == pytest.approx(mean.std().item(), rel=1e-5)
    for name, other in (("target", target[:, 0]), ("return", batch["return"][:, 0])):
        expected = torch.corrcoef(torch.stack([mean, other]))[0, 1].item()
        assert scores[f"{name}_correlation"].item() == pytest.approx(expected, abs=1e-5)
    assert "return_correlation" not in made.fit(batch.exclude("return"))
