"""Exploratory actions are of three kinds, bounded and reproducible."""

import torch

from datamodules.behaviours.exploration import KINDS, ExplorationController


def actions(policy: ExplorationController, steps: int) -> torch.Tensor:
    physics = torch.zeros(len(policy.kind), 55, dtype=torch.float64)
    return torch.stack([policy(physics) for _ in range(steps)])


def test_bounded_float32_and_every_kind_appears():
    policy = ExplorationController(60, 21, 0.025, seed=0)
    result = actions(policy, 50)
    assert result.shape == (50, 60, 21)
    assert result.dtype == torch.float32
    assert result.abs().max() <= 1
    assert set(policy.kind[:, 0].tolist()) == set(range(len(KINDS)))


def test_held_actions_are_held_for_the_rows_own_time():
    policy = ExplorationController(60, 21, 0.025, seed=0)
    result = actions(policy, 60)
    changed = (result[1:] != result[:-1]).any(-1)  # [59, 60]
    for row in torch.nonzero(policy.kind[:, 0] == KINDS.index("held_uniform"))[:, 0]:
        expected = torch.arange(1, 60) % policy.hold[row] == 0
        assert torch.equal(changed[:, row], expected)


def test_same_seed_same_actions_and_state_dict_resumes():
    first, again, resumed = (ExplorationController(9, 21, 0.025, seed=s) for s in (3, 3, 4))
    assert torch.equal(actions(first, 10), actions(again, 10))
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(actions(first, 10), actions(resumed, 10))
    assert not torch.equal(actions(first, 10), actions(ExplorationController(9, 21, 0.025, seed=5), 10))
