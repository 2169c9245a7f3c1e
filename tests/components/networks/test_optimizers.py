import copy

import pytest
import torch
from torch import nn

from components.networks.optimizers import FusedAdam


def twins(**settings):
    """A network and two optimisers, ours and torch's, each of a copy of its own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    made = []
    for kind in (FusedAdam, lambda groups, **each: torch.optim.Adam(groups, fused=True, **each)):
        own = copy.deepcopy(network)
        groups = [
            {"params": list(own[0].parameters())},
            {"params": []},
            {"params": list(own[2].parameters()), "lr": 0.3, "betas": (0.5, 0.9)},
        ]
        made.append((own, kind(groups, **settings)))
    return made


def descend(made, steps, seed, skip=None):
    for network, optimizer in made:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for name, parameter in network.named_parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = None if name == skip else gradient
            optimizer.step()


def assert_alike(made):
    (own, optimizer), (other, reference) = made
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert all(torch.equal(value, ours["state"][index][name]) for name, value in state.items())


def test_steps_are_those_of_torch(monkeypatch):
    made = twins(lr=0.01, eps=1e-7)
    descend(made, 1, 0)
    assert_alike(made)
    monkeypatch.setattr(torch.optim.Adam, "step", None)  # from here on ours is not to be torch's
    descend(made[:1], 5, 1)
    monkeypatch.undo()
    descend(made[1:], 5, 1)
    assert_alike(made)
    assert made[0][1].state[made[0][0][0].weight]["step"] == 6


def test_settings_and_states_may_change_between_steps():
    made = twins(lr=0.01)
    descend(made, 3, 0)
    for _, optimizer in made:
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.param_groups[2]["maximize"] = True
    descend(made, 3, 1)
    assert_alike(made)
    kept = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in made]
    descend(made, 2, 2)
    for (_, optimizer), state in zip(made, reversed(kept)):  # of either class
        optimizer.load_state_dict(state)
    descend(made, 2, 3)
    assert_alike(made)


@pytest.mark.parametrize("setting", [{"amsgrad": True}, {"weight_decay": 0.1}, {"lr": torch.tensor(0.02)}])
def test_what_a_group_asks_for_is_done(setting):
    made = twins(lr=0.01)
    for _, optimizer in made:
        optimizer.param_groups[0].update(setting)
    descend(made, 4, 0)
    assert_alike(made)


def test_parameters_without_gradients_stay():
    made = twins(lr=0.01)
    descend(made, 2, 0)
    before = made[0][0][2].bias.clone()
    descend(made, 2, 1, skip="2.bias")
    assert torch.equal(made[0][0][2].bias, before)
    assert_alike(made)


def test_closures_and_hooks_are_called():
    made, seen = twins(lr=0.01), []
    descend(made, 2, 0)
    optimizer = made[0][1]
    assert optimizer.step(lambda: 7) == 7
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]
