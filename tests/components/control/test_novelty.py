import math

import torch

from components.control.novelty import RandomNetworkDistillation


def made(**settings):
    torch.manual_seed(0)
    return RandomNetworkDistillation([3], features=16, hidden_dim=32, **settings)


def test_errors_are_mean_squares_at_normalised_and_clamped_observations():
    novelty, x = made(clamp=1.0), torch.randn(50, 3) * torch.tensor([1.0, 100.0, 0.01]) + 1
    normal = ((x - x.mean(0)) / (x.std(0, correction=0) + 1e-5)).clamp(-1, 1)
    expected = (novelty.predictor(normal) - novelty.target(normal))[0].square().mean(-1)
    assert torch.allclose(novelty.errors(x), expected, rtol=1e-3)


def test_rewards_are_errors_over_their_deviation_in_all_batches():
    novelty, seen = made(), torch.tensor([])
    for scale in (1.0, 3.0, 0.1):
        errors = scale * torch.rand(20) + scale
        seen = torch.cat([seen, errors])
        rewards = novelty.rewards(errors)
        assert rewards.shape == (20, 1)
        assert torch.allclose(rewards[:, 0], errors / seen.std(correction=0), rtol=1e-4)


def test_what_comes_often_is_soon_no_reward():
    novelty = made()
    often, seldom = torch.randn(256, 3), torch.randn(256, 3) + torch.tensor([0.0, 0.0, 6.0])
    optimizer = torch.optim.Adam(novelty.predictor.parameters(), 1e-3)
    for step in range(300):
        batch = torch.cat([often, seldom[:8]]) if step % 30 == 0 else torch.cat([often, often[:8]])
        (gradient := torch.autograd.grad(novelty.errors(batch).mean(), list(novelty.predictor.parameters())))
        for parameter, each in zip(novelty.predictor.parameters(), gradient):
            parameter.grad = each
        optimizer.step()
    errors = novelty.errors(torch.cat([often, seldom[8:16]])).detach()
    assert errors[256:].mean() > 5 * errors[:256].mean()
    assert math.isclose(novelty.target.state_dict()["0.weight"].sum().item(), made().target[0].weight.sum().item())
