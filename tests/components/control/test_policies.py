import pytest
import torch

from components.control.policies import (
    ClippedGaussianPolicy,
    DeterministicPolicy,
    NormalPolicy,
    TanhGaussianPolicy,
    best_of,
)


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
    expected = torch.distributions.Normal(mean, 0.2).log_prob(action).sum(-1)
    torch.testing.assert_close(ClippedGaussianPolicy(mean, 0.2).log_prob(action), expected)


@pytest.mark.parametrize("tail", [0.5, 1.0, 3.0])
def test_a_density_with_tails_is_normal_near_the_mean_exponential_beyond_and_integrates_to_one(tail):
    std, action = 0.1, torch.linspace(-40, 40, 1_000_001, dtype=torch.float64)[:, None]
    mean = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    log_prob = ClippedGaussianPolicy(mean, std, tail=tail).log_prob(action)
    assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-6)
    off = action[:, 0] / std
    expected = torch.where(off.abs() < tail, -0.5 * off**2, -tail * (off.abs() - 0.5 * tail))
    torch.testing.assert_close(log_prob - log_prob.max(), expected)
    ClippedGaussianPolicy(mean, std, tail=tail).log_prob(torch.tensor([[5.0]])).sum().backward()
    assert mean.grad.item() == pytest.approx(tail / std)


def test_best_of_takes_the_sample_of_highest_value():
    torch.manual_seed(0)
    policy = ClippedGaussianPolicy(torch.zeros(6, 2), 0.2)
    assert torch.equal(best_of(policy, lambda a: a.sum(-1), samples=1), policy.mean)
    torch.manual_seed(1)
    samples = policy.sample(sample_shape=(50,))
    torch.manual_seed(1)
    best = best_of(policy, lambda a: a.sum(-1), samples=50)
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


def fixed_noise(monkeypatch, noise: float) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.full(shape, noise))


@pytest.mark.parametrize(
    ("mean", "noise", "clip", "action", "slope"),
    [(0.95, 1.2, None, 1.0, 0.0), (-0.9, -2.0, 0.3, -1.0, 0.0), (0.5, 3.5, 0.3, 0.8, 1.0)],
)
def test_bounded_noise_stops_the_gradient_at_the_ends_of_the_range(monkeypatch, mean, noise, clip, action, slope):
    fixed_noise(monkeypatch, noise)
    mean = torch.tensor([[mean]], requires_grad=True)
    sampled = ClippedGaussianPolicy(mean, 0.2, bounded=True).sample(clip=clip)
    assert sampled.item() == pytest.approx(action)
    assert torch.autograd.grad(sampled.sum(), mean)[0].item() == pytest.approx(slope)
    through = ClippedGaussianPolicy(mean, 0.2).sample(clip=clip)
    assert torch.autograd.grad(through.sum(), mean)[0].item() == 1.0


def test_a_policy_bounds_its_noise_unless_told_otherwise(monkeypatch):
    fixed_noise(monkeypatch, 10.0)
    policy = ClippedGaussianPolicy(torch.zeros(1, 1), 0.1, clip=0.3)
    assert policy.sample().item() == pytest.approx(0.3)
    assert policy.sample(clip=0.5).item() == pytest.approx(0.5)


def test_density_of_a_learned_noise_at_the_mean_and_at_the_ends():
    std = torch.tensor([0.2, 0.5])
    mean = torch.tensor([[0.3, -0.1]])
    log_prob = ClippedGaussianPolicy(mean, std).log_prob(torch.stack([mean, torch.ones_like(mean)]))
    expected = torch.distributions.Normal(mean, std).log_prob(torch.stack([mean, torch.ones_like(mean)])).sum(-1)
    torch.testing.assert_close(log_prob, expected)
    at_mean = ClippedGaussianPolicy(mean, 0.2).log_prob(mean) / 2
    assert at_mean.item() == pytest.approx(0.6904994)


def test_several_samples_of_every_policy():
    mean = torch.randn(4, 2)
    for policy in (
        ClippedGaussianPolicy(mean.tanh(), 0.2),
        DeterministicPolicy(mean.tanh()),
        TanhGaussianPolicy(mean, torch.full((4, 2), 0.5)),
    ):
        action, log_prob = policy.sample_with_log_prob((3,))
        assert (action.shape, log_prob.shape) == ((3, 4, 2), (3, 4))
        assert policy.sample((3,)).shape == (3, 4, 2)
        assert policy.log_prob(action).shape == (3, 4)
    torch.testing.assert_close(policy.log_prob(action), log_prob, rtol=1e-4, atol=1e-4)
    assert policy.log_prob(torch.ones(4, 2)).isfinite().all()  # as data may hold them
    with pytest.raises(ValueError, match=r"noise_clip=0.3: expected null for a tanh-Gaussian"):
        policy.sample(clip=0.3)


def test_cloning_a_deterministic_policy_is_least_squares():
    mean = torch.randn(5, 2, requires_grad=True)
    action = torch.randn(5, 2)
    torch.testing.assert_close(-DeterministicPolicy(mean).log_prob(action), (action - mean).square().sum(-1))


def test_best_of_chooses_for_each_row_by_itself():
    torch.manual_seed(0)
    policy = ClippedGaussianPolicy(torch.zeros(6, 2), 0.2)
    direction = torch.tensor([[1.0, 2.0]])
    torch.manual_seed(1)
    chosen = best_of(policy, lambda action: (action * direction).sum(-1), 20)
    torch.manual_seed(1)
    candidates = policy.sample((20,))
    along = (candidates * direction).sum(-1)
    assert torch.equal((chosen * direction).sum(-1), along.max(0).values)
    assert torch.equal(chosen[3], candidates[along[:, 3].argmax(), 3])


def test_the_normal_policy_is_torchs_distribution():
    torch.manual_seed(0)
    mean, std = torch.randn(4, 3), torch.rand(3) + 0.1
    policy = NormalPolicy(mean, std)
    reference = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    action, log_prob = policy.sample_with_log_prob((5,))
    assert torch.allclose(log_prob, reference.log_prob(action), atol=1e-5)
    assert torch.allclose(policy.entropy(), reference.entropy(), atol=1e-5)
    drawn = policy.sample((200_000,))
    assert torch.allclose(drawn.mean(0), mean, atol=0.02)
    assert torch.allclose(drawn.std(0), std.expand(4, 3), rtol=0.02)
