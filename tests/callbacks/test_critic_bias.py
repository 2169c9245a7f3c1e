from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict.nn import TensorDictModule

from callbacks.critic_bias import CriticBias, soft_returns
from datamodules.environments.zero_value import ZeroValueEnv


def test_soft_returns_are_those_of_brute_force():
    torch.manual_seed(0)
    reward, log_prob = torch.randn(3, 6), torch.randn(3, 6)
    terminated = torch.zeros(3, 6, dtype=torch.bool)
    terminated[1, 3] = True
    found = soft_returns(reward, terminated, log_prob, 0.9, 0.2)
    for row in range(3):
        for first in range(6):
            expected = 0.0
            for k in range(first, 6):
                expected += 0.9 ** (k - first) * reward[row, k]
                if k > first:
                    expected -= 0.9 ** (k - first) * 0.2 * log_prob[row, k]
                if terminated[row, k]:
                    break
            assert found[row, first].item() == pytest.approx(float(expected), abs=1e-5)


class ConstantReward(ZeroValueEnv):
    """Pays 1 a step; the first row terminates after 5 steps."""

    def _step(self, tensordict):
        result = super()._step(tensordict)
        result["reward"] = torch.ones_like(self._reward)
        if (self._steps[0] >= 5).all():
            result["terminated"][0] = result["done"][0] = True
        return result


class Critic:
    """Says `offset` more than what it is worth to be paid 1 for ever, entropy bonus included."""

    device, discount, offset = torch.device("cpu"), 0.9, 0.7

    def __init__(self) -> None:
        self.scores: dict[str, list[float]] = {}
        self.add_scores = self.scores.update

    @contextmanager
    def evaluation(self):
        yield

    def alpha(self) -> float:
        return 0.5

    def valued_policy(self) -> TensorDictModule:
        return TensorDictModule(
            lambda seen: (torch.zeros_like(seen), torch.full(seen.shape[:1], -0.2)),
            ["observation"],
            ["action", "action_log_prob"],
        )

    def values(self, observation, action):
        value = torch.full(observation.shape[:1], 1 / 0.1 + 0.9 * 0.1 / 0.1 + self.offset)
        return value, value - 0.3


def test_known_bias_is_found():
    critic, probe = Critic(), CriticBias(partial(ZeroValueEnvWithPay), rows=4, scored_steps=5)
    probe.on_validation_epoch_end(SimpleNamespace(), critic)
    cut = 1e-3 * 11  # what the end of the rollout hides at most
    assert critic.scores["critic_bias/mean"] == pytest.approx([0.7] * 4, abs=cut)
    assert critic.scores["critic_bias/penalised"] == pytest.approx([0.4], abs=cut)
    assert critic.scores["critic_bias/normalised"] == pytest.approx([0.7 / 10.9], abs=cut)
    assert critic.scores["critic_bias/std"][0] < cut


class ZeroValueEnvWithPay(ZeroValueEnv):
    def _step(self, tensordict):
        return super()._step(tensordict).set("reward", torch.ones_like(self._reward))


class HeldActions(ZeroValueEnvWithPay):
    """Counts its episodes in control steps, two to a decision, and pays nothing once they are over."""

    action_repeat = 2

    def __init__(self, *, episode_length: int, **settings) -> None:
        super().__init__(episode_length=-(-episode_length // 2), **settings)

    def _step(self, tensordict):
        result = super()._step(tensordict)
        return result.set("reward", result["reward"] * (self._steps <= self.episode_length))


def test_episodes_last_as_long_as_is_looked_at_where_actions_are_held():
    critic, probe = Critic(), CriticBias(HeldActions, rows=4, scored_steps=5)
    probe.on_validation_epoch_end(SimpleNamespace(), critic)
    assert critic.scores["critic_bias/mean"] == pytest.approx([0.7] * 4, abs=1e-3 * 11)


def test_states_after_a_termination_do_not_count():
    critic, probe = Critic(), CriticBias(partial(ConstantReward), rows=2, scored_steps=20)
    probe.on_test_epoch_end(SimpleNamespace(), critic)
    values = 0.7 + 10.9
    alive = [values - sum(0.9**k * (1 + 0.1 * (k > 0)) for k in range(5 - first)) for first in range(5)]
    found = critic.scores["critic_bias/mean"]
    assert found == pytest.approx([2 * sum(alive) / 25, 2 * 20 * 0.7 / 25], abs=0.02)  # of 5 and 20 states
    assert critic.scores["critic_bias/normalised"][0] * 25 > 0


def test_methods_without_critics_and_discounts_without_an_end_are_refused():
    probe = CriticBias(ConstantReward)
    with pytest.raises(ValueError, match="expected an actor-critic, found SimpleNamespace without valued_policy"):
        probe.on_fit_start(SimpleNamespace(), SimpleNamespace())
    critic = Critic()
    critic.discount = 1.0
    with pytest.raises(ValueError, match=r"module.discount=1.0: expected a number between 0 and 1"):
        probe.on_fit_start(SimpleNamespace(), critic)
