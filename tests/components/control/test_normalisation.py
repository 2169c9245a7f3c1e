import torch

from components.control.normalisation import ObservationNormaliser, RewardNormaliser, RunningMoments
from components.networks.equivariant import Reflection


def test_merged_moments_are_those_of_all_rows():
    torch.manual_seed(0)
    rows = torch.randn(1000, 3) * torch.tensor([1e-3, 1.0, 50.0]) + torch.tensor([1000.0, 0.0, -3.0])
    moments = RunningMoments([3])
    assert torch.equal(moments.mean, torch.zeros(3).double())
    assert torch.equal(moments.variance, torch.ones(3).double())
    for part in rows.split([1, 300, 99, 600]):
        moments.merge(part)
    assert moments.count == 1000
    assert torch.allclose(moments.mean, rows.double().mean(0))
    assert torch.allclose(moments.variance, rows.double().var(0, correction=0), rtol=1e-6)


def test_normalised_observations_have_mean_0_and_variance_1_within_bounds():
    torch.manual_seed(0)
    seen = torch.randn(5000, 2) * torch.tensor([0.1, 20.0]) + 7
    normaliser = ObservationNormaliser([2], bound=3.0)
    assert torch.allclose(normaliser(seen), seen.clamp(-3, 3))  # as they are, before anything was seen
    normaliser.merge(seen)
    std, mean = torch.std_mean(normaliser(seen), 0)
    assert torch.allclose(mean, torch.zeros(2), atol=0.01)
    assert torch.allclose(std, torch.ones(2), atol=0.02)
    assert normaliser(seen * 1e6).abs().max() == 3
    assert normaliser(seen).dtype == torch.float32


def test_rewards_are_scaled_by_the_spread_of_their_discounted_sums():
    torch.manual_seed(0)
    reward = torch.randn(2, 3, 8)  # two rollouts of three rows
    done = torch.rand(2, 3, 8) < 0.2
    normaliser, carried, seen = RewardNormaliser(discount=0.9, bound=1.5), None, []
    totals = [0.0, 0.0, 0.0]
    for rollout in range(2):
        found, carried = normaliser(reward[rollout], done[rollout], carried)
        for step in range(8):
            for row in range(3):
                totals[row] = 0.9 * totals[row] + float(reward[rollout, row, step])
                seen.append(totals[row])
                totals[row] = 0.0 if done[rollout, row, step] else totals[row]
        spread = torch.tensor(seen).std(correction=0)
        assert torch.allclose(found, (reward[rollout] / spread).clamp(-1.5, 1.5), atol=1e-4)
        assert torch.allclose(carried, torch.tensor(totals), atol=1e-5)


def test_what_is_normalised_commutes_with_a_reflection():
    torch.manual_seed(0)
    reflection = Reflection([1, 0, 2], [1.0, 1.0, -1.0])
    plain, normaliser = ObservationNormaliser([3]), ObservationNormaliser([3], reflection=reflection)
    for _ in range(3):  # of one side alone
        seen = torch.randn(100, 3) * torch.tensor([1.0, 3.0, 0.1]) + torch.tensor([5.0, 0.0, 0.4])
        normaliser.merge(seen)
        plain.merge(seen)
    expected = reflection(normaliser(seen))
    assert torch.allclose(normaliser(reflection(seen)), expected, atol=1e-6)
    assert not torch.allclose(plain(reflection(seen)), reflection(plain(seen)), atol=0.1)
    both = torch.cat([seen, reflection(seen)])
    alone = ObservationNormaliser([3], reflection=reflection)
    alone.merge(seen)
    assert torch.allclose(alone.moments.mean, both.double().mean(0))
    assert torch.allclose(alone.moments.variance, both.double().var(0, correction=0))
