import pytest
import torch
from tensordict import TensorDict

from datamodules.stored.d4rl import D4RLTask, d4rl_normalized_score


def test_d4rl_score():
    assert d4rl_normalized_score("halfcheetah-medium-v2", 12135.0) == 100
    assert d4rl_normalized_score("hopper-medium-replay-v2", -20.272305) == 0
    assert d4rl_normalized_score("walker2d-medium-expert-v2", (1.629008 + 4592.3) / 2) == pytest.approx(50)
    assert d4rl_normalized_score("antmaze-umaze-v2", 0.25) == 25
    assert d4rl_normalized_score("ant-medium-v2", 3879.7) == 100
    assert d4rl_normalized_score("halfcheetah", 5000) == pytest.approx(42.53003, abs=1e-5)
    assert d4rl_normalized_score("hopper", 3000) == pytest.approx(92.80090, abs=1e-5)
    assert d4rl_normalized_score("walker2d", 4500) == pytest.approx(97.98940, abs=1e-5)
    with pytest.raises(ValueError, match="found 'humanoid-medium-v2'"):
        d4rl_normalized_score("humanoid-medium-v2", 1.0)


def test_scores_of_d4rl():
    """A policy that falls at once, and one that earns as much as D4RL's expert."""
    task = D4RLTask("d4rl", {"reward": "reward"}, lambda rows: None, 2, lambda: None, data_name="hopper-medium-v2")
    result = TensorDict({"return": torch.tensor([[-20.272305, 3234.3]])}, batch_size=[1])
    metrics = task.metrics(result)
    assert metrics["d4rl/reward/score"] == pytest.approx([0.0, 100.0], abs=1e-4)
    assert list(metrics) == task.metric_names
    assert metrics["d4rl/reward/return"] == result["return"][0].tolist()
