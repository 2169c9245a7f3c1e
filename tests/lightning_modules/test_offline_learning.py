"""Offline agents on a bandit whose best action is known: rewards -(a - 0.5)^2 of actions from all over the range."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict

from components.control.actor_objectives import (
    AdvantageSampled,
    AdvantageWeighted,
    BehaviourCloning,
    ReparameterisedGradient,
)
from components.control.actors import ClippedGaussianActor
from components.control.pessimism import FixedPessimism
from components.control.state_value import StateValue
from components.networks.ensemble import EnsembleMLP
from components.priority_tree import PriorityTree
from datamodules.sampling import PrioritisedDraws, UniformBatches
from lightning_modules.actor_critic import ActorCritic

NETWORK = partial(EnsembleMLP, hidden_dim=32)
AGENTS = {
    "awac": {"objective": AdvantageWeighted(0.05, "softmax")},
    "iql": {
        "objective": AdvantageWeighted(0.05, "exp", advantage="state", over_batch="mean"),
        "value": partial(StateValue, network=NETWORK),
    },
    "asac": {"objective": AdvantageSampled(0.05)},
    "td3bc": {"objective": ReparameterisedGradient(behaviour_cloning=0.05)},
    "bc": {"objective": BehaviourCloning()},
}


def bandit(rows: int = 2000) -> TensorDict:
    action = 2 * torch.rand(rows, 1, generator=torch.Generator().manual_seed(0)) - 1
    state, ended = torch.ones(rows, 1), torch.ones(rows, 1, dtype=torch.bool)
    following = {"observation": state, "reward": -(action - 0.5).square(), "terminated": ended}
    return TensorDict({"observation": state, "action": action, "next": following}, [rows])


@pytest.mark.parametrize("name", AGENTS)
def test_all_but_the_clone_find_the_best_action(name):
    torch.manual_seed(0)
    agent = ActorCritic(
        [1],
        1,
        critic=NETWORK,
        actor=partial(ClippedGaussianActor, network=NETWORK),
        pessimism=FixedPessimism(),
        critic_learning_rate=3e-3,
        actor_learning_rate=3e-3,
        updates=400,
        **AGENTS[name],
    )
    data = bandit()
    if agent.prioritised is None:
        batches = (stack[0] for stack in UniformBatches(data, 64, 1, 0, 400, seed=0))
    else:
        tree = PriorityTree(len(data))
        draw = PrioritisedDraws(tree, agent.prioritised, lambda: None, data, "cpu", 64, seed=0)
        batches = map(draw, range(400))
    for batch in batches:
        metrics = agent.update(batch)
        if agent.prioritised is not None:
            tree.change(metrics["priorities", "index"], metrics["priorities", "logit"])
    found = agent.actor.act(torch.ones(1, 1)).item()
    assert found == pytest.approx(0.0 if name == "bc" else 0.5, abs=0.12)
