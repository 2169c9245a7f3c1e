import itertools

import pytest
import torch

from components.language.reinforce import policy_loss, shaped_rewards


def test_rewards_are_normalised_by_the_populations_deviation():
    reward = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, -1.0])
    expected = torch.tensor([1.41421, -0.70711, -0.70711, 1.41421, -0.70711, -0.70711])
    torch.testing.assert_close(shaped_rewards(reward, normalise=True), expected, rtol=1e-4, atol=1e-4)
    assert not shaped_rewards(torch.ones(4), normalise=True).any()
    torch.testing.assert_close(shaped_rewards(reward, normalise=True, clip=1.0), expected.clamp(-1, 1))


def test_baselines():
    reward = torch.tensor([1.0, -1.0, 1.0])
    assert torch.equal(shaped_rewards(reward), reward)
    torch.testing.assert_close(shaped_rewards(reward, baseline="batch_mean"), reward - 1 / 3)
    torch.testing.assert_close(shaped_rewards(reward, baseline="leave_one_out"), torch.tensor([1.0, -2.0, 1.0]))
    with pytest.raises(ValueError, match="Unknown baseline='x'"):
        shaped_rewards(reward, baseline="x")
    with pytest.raises(ValueError, match="expected batches of at least two"):
        shaped_rewards(reward[:1], baseline="leave_one_out")


@pytest.mark.parametrize("mean", [False, True])
def test_with_rewards_of_one_it_is_the_likelihood(mean):
    torch.manual_seed(0)
    log_probs, mask = -torch.rand(3, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    found = policy_loss(log_probs, mask, torch.ones(3), mean)
    expected = torch.stack([-row[kept].sum() / (kept.sum() if mean else 1) for row, kept in zip(log_probs, mask)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(policy_loss(log_probs, mask, -torch.ones(3), mean), -expected)
    torch.testing.assert_close(policy_loss(log_probs.where(mask, -torch.inf), mask, torch.ones(3), mean), expected)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_its_mean_is_the_gradient_of_the_expected_reward(baseline):
    """A bandit of five arms: by enumeration, and from many samples."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    worth = torch.randn(5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits.softmax(0) * worth).sum(), logits)
    gradients = []
    for _ in range(3000):
        arms = logits.softmax(0).multinomial(8, replacement=True)
        weight = shaped_rewards(worth[arms], baseline=baseline)
        log_probs = logits.log_softmax(0)[arms][:, None]
        loss = policy_loss(log_probs, torch.ones(8, 1).bool(), weight).mean()
        gradients.append(-torch.autograd.grad(loss, logits)[0])
    gradients = torch.stack(gradients)
    error = gradients.std(0) / len(gradients) ** 0.5
    assert ((gradients.mean(0) - expected).abs() < 3 * error).all()


def test_rewards_that_are_all_the_same_teach_nothing_beside_a_baseline():
    for value, count, normalise in itertools.product((-1.0, -0.1), (4, 7, 256), (False, True)):
        for baseline in ("batch_mean", "leave_one_out"):
            rewards = torch.full((count,), value)
            assert not shaped_rewards(rewards, baseline=baseline, normalise=normalise).any()
        assert not shaped_rewards(torch.full((count,), value), normalise=True).any()
