import torch

from components.policies import ClippedGaussianPolicy, best_of


def test_samples_are_clipped_and_clamped():
    torch.manual_seed(0)
    mean = torch.tensor([[0.0, 0.95]])
    samples = ClippedGaussianPolicy(mean, 0.2).sample(clip=0.3, sample_shape=(5000,))
    assert samples.shape == (5000, 1, 2)
    assert samples[..., 0].abs().max() <= 0.3
    assert samples.abs().max() < 1
    assert (samples[..., 1] == samples[..., 1].max()).float().mean() > 0.3  # the clamp is active


def test_gradient_passes_through_the_clamp():
    mean = torch.tensor([[5.0, -5.0, 0.1]], requires_grad=True)
    ClippedGaussianPolicy(mean, 0.2).sample().sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))


def test_log_prob_is_the_normal_density():
    mean, action = torch.rand(4, 3), torch.rand(4, 3)
    expected = torch.distributions.Normal(mean, 0.2).log_prob(action)
    torch.testing.assert_close(ClippedGaussianPolicy(mean, 0.2).log_prob(action), expected)


def test_best_of_takes_the_sample_of_highest_value():
    torch.manual_seed(0)
    policy = ClippedGaussianPolicy(torch.zeros(6, 2), 0.2)
    assert torch.equal(best_of(policy, lambda a: a.sum(-1)[None], samples=1), policy.mean)
    torch.manual_seed(1)
    samples = policy.sample(sample_shape=(50,))
    torch.manual_seed(1)
    best = best_of(policy, lambda a: a.sum(-1)[None], samples=50)
    torch.testing.assert_close(best.sum(-1), samples.sum(-1).max(0).values)
