import pytest
import torch

from components.evolution.cross_entropy_method import CrossEntropyMethod


def test_mean_and_spread_are_those_of_the_elites():
    search = CrossEntropyMethod(3, population=32, elite_share=0.2, start=1 / 3, memory=0.25)
    generator = torch.Generator().manual_seed(0)
    points = search.ask(generator)
    assert torch.equal(points[0], torch.full((3,), 1 / 3))
    assert (points >= 0).all()
    assert (points <= 1).all()
    scores = torch.rand(32, generator=generator)
    search.tell(scores)
    best = points[scores.topk(6).indices]
    torch.testing.assert_close(search.mean, 0.75 * best.mean(0) + 0.25 / 3)
    torch.testing.assert_close(search.std, 0.75 * best.std(0, unbiased=True) + 0.25 * 0.5)
    assert torch.equal(search.best, points[scores.argmax()])
    assert torch.equal(search.ask(generator)[0], points[scores.argmax()])


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_top_of_a_hill(seed):
    search = CrossEntropyMethod(3, start=1 / 3)
    generator = torch.Generator().manual_seed(seed)
    top = torch.rand(3, generator=generator)
    for _ in range(15):
        points = search.ask(generator)
        search.tell(-(points - top).square().sum(1))
    assert (search.best - top).norm() < 0.05


def test_random_shooting_gathers_nowhere():
    search = CrossEntropyMethod(2, start=0.5, population=500, fresh=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        points = search.ask(generator)
        assert abs(points[1:].mean().item() - 0.5) < 0.05
        assert abs(points[1:].std().item() - 12**-0.5) < 0.02
        search.tell(-(points - 0.9).square().sum(1))
    assert (search.best - 0.9).norm() < 0.05


def test_ties_are_broken_by_what_is_given_for_that():
    search = CrossEntropyMethod(2, population=10, elite_share=0.3, start=0.5)
    points = search.ask(torch.Generator().manual_seed(0))
    scores = torch.tensor([0.0, 1.0] * 5)
    search.tell(scores, torch.arange(10.0))
    assert torch.equal(search.best, points[9])
    search.ask(torch.Generator().manual_seed(1))
    search.tell(torch.ones(10))
    assert search.mean.isfinite().all()
    assert torch.equal(search.best, search.points[0])


def test_what_is_no_number_is_the_worst_score():
    search = CrossEntropyMethod(2, population=10, elite_share=0.3, start=0.5)
    points = search.ask(torch.Generator().manual_seed(0))
    search.tell(torch.tensor([torch.nan, 1.0, 2.0, 3.0, *[torch.nan] * 6]))
    assert torch.equal(search.best, points[3])
    torch.testing.assert_close(search.mean, points[1:4].mean(0))
    with pytest.raises(ValueError, match="scores: expected one for each of 10 points, found 5"):
        search.tell(torch.zeros(5))


def test_a_search_goes_on_from_its_state():
    first, second = (CrossEntropyMethod(2, start=0.5) for _ in range(2))
    first.ask(torch.Generator().manual_seed(0))
    second.load_state_dict(first.state_dict())
    for search in (first, second):
        search.tell(search.points.sum(1))
    assert torch.equal(first.ask(torch.Generator().manual_seed(1)), second.ask(torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.0}, "low=1.0, high=1.0"),
        ({"start": 2.0}, "start=2.0: expected a number from 0.0 to 1.0"),
        ({"elite_share": 0.01}, "elite_share=0.01: expected at least two of the 32 points"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropyMethod(2, **{"start": 0.5, **settings})
