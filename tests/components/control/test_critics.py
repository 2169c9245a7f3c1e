import pytest
import torch

from components.control.critics import Critics, critic_loss
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP


def test_every_member_has_the_gradient_it_would_have_alone():
    q, target = torch.randn(3, 5, 1, requires_grad=True), torch.randn(5, 1)
    loss, errors = critic_loss(q, target)
    loss.backward()
    torch.testing.assert_close(q.grad, (q.detach() - target) / 5)
    torch.testing.assert_close(errors, (q.detach() - target)[..., 0])
    torch.testing.assert_close(critic_loss(q.repeat(2, 1, 1), target)[0], 2 * loss)


def test_quantile_loss_is_the_sum_over_all_pairs():
    torch.manual_seed(0)
    q, target = 2 * torch.randn(2, 3, 4), 2 * torch.randn(3, 5)
    expected = 0.0
    for p in range(2):
        for b in range(3):
            for i in range(4):
                for j in range(5):
                    ahead = (target[b, j] - q[p, b, i]).item()
                    huber = 0.5 * ahead**2 if abs(ahead) <= 1 else abs(ahead) - 0.5
                    expected += abs((i + 0.5) / 4 - (ahead < 0)) * huber / 3
    loss, errors = critic_loss(q, target)
    torch.testing.assert_close(loss, torch.tensor(expected))
    torch.testing.assert_close(errors, q.mean(-1) - target.mean(-1))


def test_quantiles_find_the_distribution():
    q = torch.zeros(1, 1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([q], lr=0.02)
    uniform = torch.linspace(0, 10, 1001)[None]
    for _ in range(1500):
        optimizer.zero_grad()
        critic_loss(q, uniform)[0].backward()
        optimizer.step()
    # Of a uniform distribution on [0, 10] the Huber quantile of fraction f is 9 f + 1/2 where both sides are linear.
    expected = 9 * torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]) + 0.5
    torch.testing.assert_close(q.detach().flatten(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("network", [EnsembleMLP, EnsembleResidualMLP])
@pytest.mark.parametrize("members", [slice(1), torch.tensor([3, 0])])
def test_some_critics_say_what_they_say_among_all(network, members):
    critics = Critics(5, 2, 3, 4, network).eval()
    features, action = torch.randn(6, 5), torch.randn(6, 2)
    assert torch.equal(critics(features, action, members), critics(features, action)[members])
