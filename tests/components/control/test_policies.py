import torch

from components.control.policies import ClippedGaussianPolicy, TanhGaussianPolicy, best_of


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


def test_tanh_gaussian_density_is_the_change_of_variables():
    torch.manual_seed(0)
    mean, std = torch.randn(50, 3, dtype=torch.float64), torch.rand(50, 3, dtype=torch.float64) + 0.1
    policy = TanhGaussianPolicy(mean, std)
    action, log_prob = policy.sample_with_log_prob()
    normal = torch.distributions.Normal(mean, std)
    expected = normal.log_prob(action.atanh()) - (1 - action.square()).log()
    torch.testing.assert_close(log_prob, expected.sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.log_prob(action), log_prob, rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.mean, mean.tanh())


def test_tanh_gaussian_density_stays_finite_far_out():
    mean = torch.tensor([[20.0], [-20.0], [3.0]], requires_grad=True)
    action, log_prob = TanhGaussianPolicy(mean, torch.full((3, 1), 0.1)).sample_with_log_prob()
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert mean.grad.isfinite().all()
    assert action.abs().max() <= 1
