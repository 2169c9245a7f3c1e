import pytest
import torch

from components.priority_tree import PriorityTree


def stratified(count, generator=None):
    offset = torch.full((count,), 0.5) if generator is None else torch.rand(count, generator=generator)
    return (torch.arange(count, dtype=torch.float64) + offset) / count


@pytest.mark.parametrize("rows", [1, 7, 128, 129, 1000, 20000])
def test_equal_logits_give_every_row_once_and_a_constant_changes_nothing(rows):
    tree = PriorityTree(rows)
    index, log_prob = tree.draw(stratified(rows))
    assert torch.equal(index, torch.arange(rows))
    assert torch.allclose(log_prob.exp(), torch.tensor(1 / rows, dtype=torch.float64))
    tree.change(torch.arange(rows), torch.full((rows,), 300.0))
    assert torch.equal(tree.draw(stratified(rows))[0], torch.arange(rows))


@pytest.mark.parametrize("rows", [5, 300, 40000])
def test_draws_are_those_of_the_cumulative_distribution(rows):
    generator = torch.Generator().manual_seed(0)
    tree, logits = PriorityTree(rows), 5 * torch.randn(rows, generator=generator, dtype=torch.float64)
    tree.change(torch.arange(rows), logits)
    uniform = stratified(512, generator)
    index, log_prob = tree.draw(uniform)
    probabilities = logits.softmax(0)
    assert torch.equal(index, torch.searchsorted(probabilities.cumsum(0), uniform, right=True))
    assert torch.allclose(log_prob, probabilities.log()[index])


def test_frequencies_follow_the_softmax():
    generator = torch.Generator().manual_seed(0)
    tree, logits = PriorityTree(6), torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    tree.change(torch.arange(6), logits)
    drawn = tree.draw(torch.rand(100_000, generator=generator, dtype=torch.float64))[0]
    assert torch.allclose(drawn.bincount(minlength=6) / 1e5, logits.softmax(0), atol=0.01)


def test_a_change_is_that_of_a_tree_made_anew():
    rows, generator = 40000, torch.Generator().manual_seed(0)
    tree, expected = PriorityTree(rows), torch.zeros(rows, dtype=torch.float64)
    for _ in range(20):
        index = torch.randint(rows, (64,), generator=generator)
        index[1::2] = index[0::2].flip(0)  # each of them twice or more
        logit = torch.randn(64, generator=generator)
        tree.change(index, logit)
        for place, value in zip(index.tolist(), logit.tolist()):
            expected[place] = value
    assert torch.equal(tree.logits, expected)
    anew = PriorityTree(rows)
    anew.change(torch.arange(rows), expected)
    assert all(torch.equal(a, b) for a, b in zip(tree.state_dict().values(), anew.state_dict().values()))


def test_a_change_touches_ancestors_alone():
    tree = PriorityTree(20000)
    before = {name: value.clone() for name, value in tree.state_dict().items()}
    tree.change(torch.tensor([12345]), torch.tensor([1.0]))
    changed = {name: (value != before[name]).nonzero().tolist() for name, value in tree.state_dict().items()}
    assert changed == {"level_0": [[96, 57]], "level_1": [[0, 96]], "level_2": [[0, 0]]}


def test_extreme_logits_are_drawn_and_those_of_no_chance_never():
    tree = PriorityTree(400)
    tree.change(torch.arange(400), torch.full((400,), -1e8))
    tree.change(torch.tensor([3, 399]), torch.tensor([1e5, 1e5]))
    index, log_prob = tree.draw(torch.linspace(0, 1, 101, dtype=torch.float64)[:-1])
    assert index.tolist() == [3] * 50 + [399] * 50
    assert torch.allclose(log_prob.exp(), torch.tensor(0.5, dtype=torch.float64))
    almost = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert tree.draw(almost)[0].item() == 399


def test_a_state_of_another_tree_is_refused():
    tree, state = PriorityTree(400), PriorityTree(400).state_dict()
    tree.check(state)
    for wrong in ({}, PriorityTree(600).state_dict(), {**state, "level_0": torch.full((4, 128), torch.nan)}):
        with pytest.raises(ValueError, match=r"priorities.level_0: expected numbers \[4, 128\]"):
            tree.check(wrong)
