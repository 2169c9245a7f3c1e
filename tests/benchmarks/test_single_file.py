"""What the benchmark compares has to be the same update."""

from functools import partial

import pytest
import torch

from benchmarks.single_file import (
    AWAC,
    GPL,
    IQL,
    REDQ,
    SAC,
    ModernCritics,
    SeparateCritics,
    SimpleCritics,
    make_training,
)
from components.control.actor_objectives import AdvantageWeighted
from components.control.actors import ClippedGaussianActor, EntropyTemperature, GaussianActor
from components.control.pessimism import DualPessimism, FixedPessimism, MinimumPessimism, SubsetMinimumPessimism
from components.control.state_value import StateValue
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP
from lightning_modules.actor_critic import ActorCritic

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
