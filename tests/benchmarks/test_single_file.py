"""What the benchmark compares has to be the same update."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.single_file import (
    AWAC,
    GPL,
    IQL,
    PPO,
    REDQ,
    SAC,
    ModernCritics,
    SeparateCritics,
    SimpleCritics,
    make_training,
)
from components.control.actor_objectives import AdvantageWeighted
from components.control.actors import ClippedGaussianActor, EntropyTemperature, GaussianActor, NormalActor
from components.control.normalisation import ObservationNormaliser
from components.control.pessimism import DualPessimism, FixedPessimism, MinimumPessimism, SubsetMinimumPessimism
from components.control.state_value import StateValue
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP
from datamodules.environments.gymnasium import GymnasiumEnv
from datamodules.on_policy import OnPolicyDataModule
from lightning_modules.actor_critic import ActorCritic
from lightning_modules.ppo import ProximalPolicyOptimisation

WIDTH = 8


NETWORK = partial(EnsembleMLP, hidden_dim=WIDTH, last_gain=1.0)


def ours(critic, pessimism, **settings) -> ActorCritic:
    defaults = {"actor": partial(GaussianActor, network=NETWORK), "temperature": EntropyTemperature, "updates": 100}
    made = partial(critic, hidden_dim=WIDTH, last_gain=1.0)
    return ActorCritic([5], 2, critic=made, pessimism=pessimism, **{**defaults, **settings})


def theirs(plain, critics, made: ActorCritic):
    """The single-file agent with the weights of ours."""
    agent = plain(5, 2, critics(7, made.critic.network[0].weight.shape[0], WIDTH), WIDTH)
    for network, target in ((agent.critics, False), (agent.targets, True)):
        source = (made.target_critic if target else made.critic).state_dict()
        state = network.state_dict()
        if critics is SeparateCritics:  # nn.Linear keeps the transpose
            stacked = [value.mT if "weight" in name else value for name, value in source.items()]
            source = {str(index): value for index, value in enumerate(v for p in zip(*stacked) for v in p)}
        assert [value.numel() for value in state.values()] == [value.numel() for value in source.values()]
        network.load_state_dict({name: value.view_as(state[name]) for name, value in zip(state, source.values())})
    copied = [(agent.actor.layers, made.actor.network)]
    copied += [(agent.value, made.value.network)] if plain is IQL else []
    with torch.no_grad():
        for layers, network in copied:
            linear = [layer for layer in layers if hasattr(layer, "weight")]
            for layer, source in zip(linear, list(network)[::2], strict=True):
                layer.weight.copy_(source.weight[0].T)
                layer.bias.copy_(source.bias[0, 0])
        if plain is IQL:
            agent.actor.log_std.copy_(made.actor.log_std)
    return agent


CASES = {
    "sac": (EnsembleMLP, MinimumPessimism, {}, SAC, SimpleCritics),
    "redq": (EnsembleMLP, SubsetMinimumPessimism, {"members": 5, "actor_every": 2}, REDQ, SeparateCritics),
    "gpl": (
        EnsembleResidualMLP,
        DualPessimism,
        {
            "members": 5,
            "actor_every": 2,
            "actor_max_norm": 40,
            "temperature_learning_rate": 1e-4,
            "temperature_momentum": 0.5,
        },
        GPL,
        ModernCritics,
    ),
    "awac": (
        EnsembleMLP,
        FixedPessimism,
        {
            "actor": partial(ClippedGaussianActor, network=NETWORK),
            "objective": AdvantageWeighted(weighting="softmax", value_samples=1, pessimism=None),
            "temperature": None,
        },
        AWAC,
        SimpleCritics,
    ),
    "iql": (
        EnsembleMLP,
        MinimumPessimism,
        {
            "actor": partial(ClippedGaussianActor, network=NETWORK, std=1.0, learned=True),
            "objective": AdvantageWeighted(1 / 3, "exp", advantage="state", over_batch="mean", over_action="sum"),
            "value": partial(StateValue, network=NETWORK, next_value="before"),
            "temperature": None,
        },
        IQL,
        SimpleCritics,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_single_file_updates_are_ours(case, transitions):
    critic, pessimism, settings, plain, critics = CASES[case]
    torch.manual_seed(0)
    made = ours(critic, pessimism(), **settings)
    agent = theirs(plain, critics, made)
    rows = transitions(64)
    data = (
        rows["observation"],
        rows["action"],
        rows["next", "observation"],
        rows["next", "reward"][:, 0],
        rows["next", "terminated"][:, 0].float(),
    )
    torch.manual_seed(1)
    make_training(agent, data, 16, settings.get("actor_every", 1))(4)
    torch.manual_seed(1)
    for _ in range(4):
        made.run_update(rows[torch.randint(64, (16,))])
        made.updates += 1

    again = theirs(plain, critics, made)  # an agent that learned what ours did has the very weights of ours
    for learned, copied in ((agent.critics, again.critics), (agent.targets, again.targets)):
        for found, expected in zip(learned.parameters(), copied.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if made.temperature is not None:
        torch.testing.assert_close(agent.log_alpha, made.temperature.log_alpha)
    torch.testing.assert_close(agent.actor.layers[0].weight, made.actor.network[0].weight[0].T, rtol=1e-4, atol=1e-6)
    if plain is IQL:
        torch.testing.assert_close(agent.value[0].weight, made.value.network[0].weight[0].T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(agent.actor.log_std, made.actor.log_std)
    if plain is GPL:
        torch.testing.assert_close(agent.beta, made.pessimism.beta)
        assert agent.beta.item() != 0.5


def test_single_file_rollouts_and_their_updates_are_ours():
    tanh = partial(EnsembleMLP, hidden_dim=WIDTH, last_gain=1.0, activation="tanh")
    torch.manual_seed(0)
    made = ProximalPolicyOptimisation(
        [3], 1, actor=partial(NormalActor, network=tanh), value=tanh, normaliser=ObservationNormaliser, updates=12
    )
    agent = PPO(3, 1, WIDTH)
    with torch.no_grad():
        for layers, network in ((agent.actor, made.actor.network), (agent.value, made.value)):
            for layer, source in zip(list(layers)[::2], list(network)[::2], strict=True):
                layer.weight.copy_(source.weight[0].T)
                layer.bias.copy_(source.bias[0, 0])
    make_env = partial(GymnasiumEnv, "Pendulum-v1", episode_length=7)
    sizes = {"num_envs": 4, "rollout_steps": 6, "epochs": 2, "updates_per_step": 4, "evaluate_every": 12}
    data = OnPolicyDataModule(make_env, {"default": {"rewards": ["reward"]}}, **sizes)
    data.trainer = SimpleNamespace(lightning_module=made)
    env = make_env(num_envs=4, seed=0)
    observation = env.reset()["observation"]
    torch.manual_seed(1)
    rollouts = iter(data.train_dataloader())
    for _ in range(3):
        state = torch.get_rng_state()
        batches = list(next(rollouts).unbind(0))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        collected, observation = agent.collect(env, observation, 6)
        assert torch.equal(torch.get_rng_state(), after)
        prepared = agent.prepare(collected)
        for batch in batches:
            made.update(batch)
            # The same transitions, which the single file has in another order.
            index = [int((prepared[1] - action).abs().sum(-1).argmin()) for action in batch["action"]]
            plain = tuple(each[index] for each in prepared)
            for found, name in zip(plain, ("observation", "action", "log_prob", "advantage", "return")):
                torch.testing.assert_close(found, batch[name], rtol=1e-3, atol=1e-4)
            agent.update(plain)
            made.updates += 1
    for layers, network in ((agent.actor, made.actor.network), (agent.value, made.value)):
        for layer, source in zip(list(layers)[::2], list(network)[::2], strict=True):
            torch.testing.assert_close(layer.weight, source.weight[0].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(agent.log_std, made.actor.log_std, rtol=1e-4, atol=1e-5)
