import pytest
import torch

from components.coding.class_incremental import align_weights, average_incremental_accuracy, forgetting, herding


def test_herding_is_brute_force():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    order = herding(features)
    assert sorted(order.tolist()) == list(range(12))
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    chosen: list[int] = []
    for _ in range(12):
        left = [row for row in range(12) if row not in chosen]
        best = min(left, key=lambda row: (unit.mean(0) - unit[[*chosen, row]].mean(0)).norm().item())
        chosen.append(best)
    assert order.tolist() == chosen


def test_aligned_rows_have_the_mean_norm_of_the_others_and_their_own_directions():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    align_weights(weight, 3, 5)
    assert torch.equal(weight[[0, 1, 2, 5]], before[[0, 1, 2, 5]])
    assert weight[3:5].norm(dim=1).mean().item() == pytest.approx(before[:3].norm(dim=1).mean().item(), rel=1e-5)
    ratio = weight[3:5] / before[3:5]
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


def test_scores_by_hand():
    accuracies = torch.tensor([[90.0, 0, 0], [70.0, 80.0, 0], [75.0, 85.0, 60.0]])
    assert forgetting(accuracies) == pytest.approx(((90 - 75) + (85 - 85)) / 2)
    assert forgetting(accuracies[:1, :1]) == 0
    assert average_incremental_accuracy(torch.tensor([90.0, 75.0, 72.0])) == pytest.approx(79.0)
    assert average_incremental_accuracy(torch.full((4,), 31.0)) == 31
