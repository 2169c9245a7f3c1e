"""Tiny problems whose answers are known in closed form: do the methods find them?"""

from functools import partial

import pytest
import torch
from tensordict import TensorDict

from components.control.actor_objectives import AdvantageWeighted, ReparameterisedGradient
from components.control.actors import DeterministicActor, EntropyTemperature, GaussianActor, ScheduledNoiseActor
from components.control.forward_backward import BackwardMap, ForwardMap, ZConditionedActor, sample_sphere
from components.control.pessimism import DualPessimism, MinimumPessimism, SubsetMinimumPessimism
from components.networks.encoders import FeatureTrunk, PixelEncoder, RandomShift
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP
from components.networks.signal_mixing import SignalMixing
from datamodules.environments.overdrive import OverdriveEnv, OverdriveTask
from datamodules.stored.offline import OfflineDataModule
from datamodules.stored.overdrive import overdrive_dataset
from lightning_modules.actor_critic import ActorCritic
from lightning_modules.forward_backward import ForwardBackward

STATES, DISCOUNT = 6, 0.8


def agent(observation_dim, features, updates, discount, **settings):
    torch.manual_seed(0)
    defaults = {
        "objective": AdvantageWeighted(value_samples=1),
        "forward_map": partial(ForwardMap, hidden_dim=64, gain=1.0),
        "backward_map": partial(BackwardMap, hidden_dim=64),
        "actor": partial(ZConditionedActor, hidden_dim=64),
        "learning_rate": 1e-3,
        "backward_learning_rate": 1e-3,
        "actor_learning_rate": 1e-3,
        "target_rate": 0.02,
    }
    return ForwardBackward(
        [observation_dim], 2, features=features, updates=updates, discount=discount, **{**defaults, **settings}
    )


def test_successor_measure_of_a_random_walk_is_recovered_to_five_percent():
    """A lazy random walk on a ring that no action influences: M = P (1 - discount P)^{-1} for every policy."""
    ring = torch.eye(STATES)
    transition = 0.5 * ring + 0.25 * ring.roll(1, 1) + 0.25 * ring.roll(-1, 1)
    exact = transition @ torch.linalg.inv(torch.eye(STATES) - DISCOUNT * transition) * STATES  # density: rho = 1/STATES
    module = agent(STATES, STATES, 1200, DISCOUNT, orthonormality=0.1)
    generator = torch.Generator().manual_seed(0)
    for update in range(1200):
        for optimizer in module._optimizers:  # anneal: what is left of the error is the noise of sampled pairs
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, 2 * (1 - update / 1200))
        state = torch.randint(STATES, (256,), generator=generator)
        arrived = torch.multinomial(transition[state], 1, generator=generator).squeeze(1)
        module.update(
            TensorDict(
                {
                    "observation": ring[state],
                    "action": 2 * torch.rand(256, 2, generator=generator) - 1,
                    "next": {"observation": ring[arrived], "terminated": torch.zeros(256, 1, dtype=torch.bool)},
                },
                batch_size=[256],
            )
        )
    with torch.no_grad():
        z, actions = sample_sphere((64, STATES)), 2 * torch.rand(64, 2) - 1
        states = torch.arange(STATES).repeat_interleave(64)
        forward = module.forward_map(ring[states], z.repeat(STATES, 1), actions.repeat(STATES, 1)).mean(0)
        density = (forward @ module.backward_map(ring)[0].T).unflatten(0, (STATES, 64))
    error = (density - exact.unsqueeze(1)).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.05
    torch.testing.assert_close(density.mean(), torch.tensor(1 / (1 - DISCOUNT)), rtol=0.02, atol=0)


def overdrive_score(coverage, objective, updates=400):
    module = agent(2, 16, updates, 0.9, objective=objective)
    data = OfflineDataModule(
        partial(overdrive_dataset, coverage, 400),
        OverdriveEnv,
        {"goals": {"rewards": ["top_right", "top_left", "bottom_left", "bottom_right", "centre"]}},
        batch_size=256,
        updates_per_step=1,
        evaluate_every=updates,
        inference_samples=5000,
        task=OverdriveTask,
    )
    data.setup("fit")
    transitions = data.dataset.data
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        module.update(transitions[torch.randint(len(transitions), (256,), generator=generator)])
    (task,) = data.evaluation_tasks(10)
    metrics = task.metrics(module.evaluate(task))
    assert list(metrics) == data.metric_names
    return sum(metrics["goals/score"]) / 10


def test_advantage_weighting_reaches_goals_that_the_policy_gradient_misses_on_narrow_data():
    assert overdrive_score("narrow", AdvantageWeighted()) > 0.15
    assert overdrive_score("narrow", ReparameterisedGradient(0.5, 0.3)) < 0.1


AGENTS = {
    "sac": {"pessimism": MinimumPessimism, "temperature": partial(EntropyTemperature, initial=0.01, target_entropy=-4)},
    "td3": {"pessimism": partial(MinimumPessimism, "first"), "target_actor": True, "actor_every": 2},
    "redq": {"pessimism": SubsetMinimumPessimism, "members": 5},
    "gpl": {"pessimism": DualPessimism, "members": 3, "critic": partial(EnsembleResidualMLP, hidden_dim=32)},
    "quantiles": {"pessimism": DualPessimism, "members": 3, "quantiles": 5},
}


@pytest.mark.parametrize("name", AGENTS)
def test_actor_critics_find_the_best_action_and_its_value(name):
    """Paid 1 - |a - g(s)|^2 for ever in a state that stays: a* = g(s), Q* = reward + discount / (1 - discount)."""
    torch.manual_seed(0)
    settings = {
        "critic": partial(EnsembleMLP, hidden_dim=32),
        "actor": partial(DeterministicActor, network=partial(EnsembleMLP, hidden_dim=32), target_std=0.0),
        "discount": 0.5,
        "critic_learning_rate": 3e-3,
        "actor_learning_rate": 3e-3,
        "target_rate": 0.05,
        "updates": 1000,
        **AGENTS[name],
    }
    if "temperature" in settings:
        settings["actor"] = partial(GaussianActor, network=partial(EnsembleMLP, hidden_dim=32))
    settings["pessimism"] = settings["pessimism"]()
    agent = ActorCritic([1], 2, **settings)

    def best(state):
        return torch.cat([0.6 * state, -0.3 + 0 * state], -1)

    def reward(state, action):
        return 1 - (action - best(state)).square().sum(-1, keepdim=True)

    for _ in range(1000):
        state, action = 2 * torch.rand(128, 1) - 1, 2 * torch.rand(128, 2) - 1
        following = {
            "observation": state,
            "reward": reward(state, action),
            "terminated": torch.zeros(128, 1, dtype=torch.bool),
        }
        agent.run_update(TensorDict({"observation": state, "action": action, "next": following}, [128]))
        agent.updates += 1

    state = torch.linspace(-0.9, 0.9, 20)[:, None]
    action = agent.policy()(TensorDict({"observation": state}, [20]))["action"]
    assert (action - best(state)).abs().mean() < 0.08  # 0.35 for the action at the start
    mean, _ = agent.values(state, best(state))
    entropy = float(agent.alpha()) * 4 if "temperature" in AGENTS[name] else 0.0
    assert (mean - 2.0).abs().mean() < 0.1 + entropy


PIXEL_AGENTS = {
    "drq": {"augmentation": RandomShift(1)},
    "alix": {"mixing": partial(SignalMixing, pad=0.5)},
}


@pytest.mark.parametrize("name", PIXEL_AGENTS)
def test_pixel_agents_find_the_best_action_and_its_value(name):
    """The same, where the state is the place of a square in a picture."""
    torch.manual_seed(0)
    agent = ActorCritic(
        [3, 20, 20],
        2,
        critic=partial(EnsembleMLP, hidden_dim=32),
        actor=partial(ScheduledNoiseActor, network=partial(EnsembleMLP, hidden_dim=32), anneal_steps=600),
        pessimism=MinimumPessimism(),
        encoder=partial(PixelEncoder, channels=8, **PIXEL_AGENTS[name]),
        trunk=partial(FeatureTrunk, feature_dim=20),
        discount=0.5,
        critic_learning_rate=3e-3,
        encoder_learning_rate=3e-3,
        actor_learning_rate=3e-3,
        target_rate=0.05,
        updates=600,
    )

    def picture(corner):
        place = torch.arange(20)
        inside = [(place >= c[:, None]) & (place < c[:, None] + 4) for c in corner.unbind(1)]
        return (255 * (inside[1][:, :, None] & inside[0][:, None, :])).to(torch.uint8)[:, None].repeat(1, 3, 1, 1)

    def best(corner):
        return (corner - 8) / 10

    def reward(corner, action):
        return 1 - (action - best(corner)).square().sum(-1, keepdim=True)

    for step in range(600):
        corner, action = torch.randint(1, 16, (64, 2)), 2 * torch.rand(64, 2) - 1
        following = {
            "observation": picture(corner),
            "reward": reward(corner, action),
            "terminated": torch.zeros(64, 1, dtype=torch.bool),
        }
        agent.advance(step)
        agent.run_update(TensorDict({"observation": picture(corner), "action": action, "next": following}, [64]))
        agent.updates += 1

    corner = torch.cartesian_prod(torch.arange(2, 15, 3), torch.arange(2, 15, 3))
    action = agent.policy()(TensorDict({"observation": picture(corner)}, [len(corner)]))["action"]
    assert (action - best(corner)).abs().mean() < 0.12  # 0.36 for the middle of the picture
    mean, _ = agent.values(picture(corner), best(corner))
    # Where pictures are mixed, the corner is known less well, and so is the action, while it learns.
    assert (mean - 2.0).abs().mean() < (0.15 if name == "drq" else 0.35)  # 1.2 for the value of random actions
