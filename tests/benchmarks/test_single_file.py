"""What the benchmark compares has to be the same update."""

from functools import partial

import pytest
import torch

from benchmarks.single_file import GPL, REDQ, SAC, ModernCritics, SeparateCritics, SimpleCritics, make_training
from components.control.actors import EntropyTemperature, GaussianActor
from components.control.pessimism import DualPessimism, MinimumPessimism, SubsetMinimumPessimism
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP
from lightning_modules.actor_critic import ActorCritic

WIDTH = 8


def ours(critic, pessimism, **settings) -> ActorCritic:
    network = partial(EnsembleMLP, hidden_dim=WIDTH, last_gain=1.0)
    return ActorCritic(
        [5],
        2,
        critic=partial(critic, hidden_dim=WIDTH, last_gain=1.0),
        actor=partial(GaussianActor, network=network),
        pessimism=pessimism,
        temperature=EntropyTemperature,
        updates=100,
        **settings,
    )


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
    linear = [layer for layer in agent.actor.layers if hasattr(layer, "weight")]
    with torch.no_grad():
        for layer, source in zip(linear, list(made.actor.network)[::2], strict=True):
            layer.weight.copy_(source.weight[0].T)
            layer.bias.copy_(source.bias[0, 0])
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
    torch.testing.assert_close(agent.log_alpha, made.temperature.log_alpha)
    torch.testing.assert_close(agent.actor.layers[0].weight, made.actor.network[0].weight[0].T, rtol=1e-4, atol=1e-6)
    if plain is GPL:
        torch.testing.assert_close(agent.beta, made.pessimism.beta)
        assert agent.beta.item() != 0.5
