import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Reading
from torch import nn
from torchrl.modules import IndependentNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate

from components.control.on_policy import (
    clipped_policy_loss,
    clipped_value_loss,
    divergence,
    generalised_advantages,
)
from components.control.policies import NormalPolicy

DISCOUNT, TRACE = 0.9, 0.7


@pytest.fixture
def steps():
    """Reward, value and next value of rows that go on, end of themselves and are cut off; terminated and done."""
    generator = torch.Generator().manual_seed(0)
    reward, value, next_value = torch.randn(3, 4, 9, generator=generator)
    terminated, truncated = torch.rand(2, 4, 9, generator=generator) < 0.2
    return reward, value, next_value, terminated, terminated | truncated


def test_advantages_are_the_sum_that_defines_them(steps):
    reward, value, next_value, terminated, done = steps
    found = generalised_advantages(*steps, DISCOUNT, TRACE)
    for row in range(4):
        for step in range(9):
            total, weight = 0.0, 1.0
            for later in range(step, 9):
                future = 0.0 if terminated[row, later] else next_value[row, later]
                total += weight * (reward[row, later] + DISCOUNT * future - value[row, later])
                weight *= DISCOUNT * TRACE
                if done[row, later]:
                    break
            assert found[row, step].item() == pytest.approx(float(total), abs=1e-5)


def test_advantages_are_those_of_torchrl(steps):
    reward, value, next_value, terminated, done = (each.unsqueeze(-1) for each in steps)
    expected, target = generalized_advantage_estimate(DISCOUNT, TRACE, value, next_value, reward, done, terminated)
    found = generalised_advantages(*steps, DISCOUNT, TRACE)
    assert torch.allclose(found, expected.squeeze(-1), atol=1e-5)
    assert torch.allclose(found + steps[1], target.squeeze(-1), atol=1e-5)


@pytest.mark.parametrize("trace", [0.0, 1.0])
def test_the_trace_leads_from_one_step_errors_to_returns(trace):
    reward, value, next_value = torch.randn(3, 2, 5)
    never = torch.zeros(2, 5, dtype=torch.bool)
    next_value[:, :-1] = value[:, 1:]
    found = generalised_advantages(reward, value, next_value, never, never, DISCOUNT, trace)
    if trace == 0:
        expected = reward + DISCOUNT * next_value - value
    else:
        returns, after = [], next_value[:, -1]
        for step in reversed(range(5)):
            after = reward[:, step] + DISCOUNT * after
            returns.insert(0, after)
        expected = torch.stack(returns, 1) - value
    assert torch.allclose(found, expected, atol=1e-5)


def test_losses_and_divergence_are_those_of_torchrl():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    actor = ProbabilisticTensorDictSequential(
        Reading(network, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=IndependentNormal, return_log_prob=True
        ),
    )
    critic = ValueOperator(nn.Linear(3, 1), ["observation"])
    observation, action = torch.randn(64, 3), torch.randn(64, 2)
    before, advantage, target, old = torch.randn(4, 64)
    old = old * 0.3
    policy = NormalPolicy(*network(observation))
    log_prob = policy.log_prob(action)
    batch = TensorDict(
        {
            "observation": observation,
            "action": action,
            "action_log_prob": (log_prob + old).detach(),
            "state_value": before[:, None],
            "advantage": advantage[:, None],
            "value_target": target[:, None],
        },
        [64],
    )
    for clip_value in (None, 0.2):
        reference = ClipPPOLoss(
            actor,
            critic,
            clip_epsilon=0.2,
            entropy_bonus=False,
            critic_coeff=1.0,
            loss_critic_type="l2",
            normalize_advantage=False,
            clip_value=clip_value,
        )(batch.clone())
        log_ratio = log_prob - batch["action_log_prob"]
        assert torch.allclose(clipped_policy_loss(log_ratio, advantage, 0.2), reference["loss_objective"], atol=1e-5)
        value = critic(batch.clone())["state_value"].squeeze(-1)
        own = clipped_value_loss(value, before, target, clip_value)
        assert torch.allclose(2 * own, reference["loss_critic"], atol=1e-5)  # which is not halved


def test_the_clipped_loss_has_no_slope_where_there_is_nothing_to_gain():
    ratios = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1])
    log_ratio = ratios.log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    loss = clipped_policy_loss(log_ratio, advantage, 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.3 + 0.7 - 0.8 + 2.2) / 5)
    loss.backward()
    slopes = -advantage * ratios / 5
    assert torch.allclose(log_ratio.grad, torch.tensor([0.0, slopes[1], slopes[2], 0.0, slopes[4]]))


def test_divergence_is_an_estimate_of_that_of_normal_policies():
    torch.manual_seed(0)
    old, new = (
        NormalPolicy(torch.zeros(1, 1), torch.ones(1)),
        NormalPolicy(torch.full((1, 1), 0.3), torch.ones(1) * 1.2),
    )
    action = old.sample((400_000,))
    found = divergence((new.log_prob(action) - old.log_prob(action)).flatten())
    assert found.item() == pytest.approx(math.log(1.2) + (1 + 0.09) / (2 * 1.44) - 0.5, rel=0.03)
    assert divergence(torch.zeros(5)) == 0
    assert divergence(torch.tensor([-1.0])) > 0
