import math

import pytest
import torch

from components.coding.contrastive import supervised_contrastive_loss


def views(count: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def brute_force(features: torch.Tensor, labels: list[int], temperature: float) -> float:
    unit = features / features.norm(dim=1, keepdim=True)
    losses = []
    for a in range(len(unit)):
        others = [b for b in range(len(unit)) if b != a]
        total = sum(math.exp((unit[a] @ unit[b]).item() / temperature) for b in others)
        alike = [b for b in others if labels[b] == labels[a]]
        logs = [math.log(math.exp((unit[a] @ unit[p]).item() / temperature) / total) for p in alike]
        losses.append(-sum(logs) / max(1, len(logs)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 2, 2, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 6]])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_it_is_brute_force(labels, temperature):
    found = supervised_contrastive_loss(views(), torch.tensor(labels), temperature).item()
    assert found == pytest.approx(brute_force(views(), labels, temperature), rel=1e-4)


def test_pairs_make_it_infonce():
    features, labels = views(), torch.arange(4).repeat(2)
    unit = torch.nn.functional.normalize(features, dim=1)
    likeness = (unit @ unit.T / 0.1).fill_diagonal_(-torch.inf)
    expected = torch.nn.functional.cross_entropy(likeness, torch.arange(8).roll(4))
    torch.testing.assert_close(supervised_contrastive_loss(features, labels), expected)


def test_order_and_scale_do_not_matter_and_two_views_of_one_cost_nothing():
    features, labels = views(), torch.tensor([0, 1, 0, 1, 2, 2, 0, 1])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    loss = supervised_contrastive_loss(features, labels)
    torch.testing.assert_close(supervised_contrastive_loss(3 * features[order], labels[order]), loss)
    assert supervised_contrastive_loss(views(2), torch.zeros(2)).item() == pytest.approx(0, abs=1e-6)


def test_gradient_is_finite_where_nothing_is_alike():
    features = views().requires_grad_()
    loss = supervised_contrastive_loss(features, torch.arange(8))
    loss.backward()
    assert loss.item() == 0
    assert features.grad.isfinite().all()
