"""What batches of stored transitions bring beside: what followed, within episodes, geometrically later."""

import torch
from tensordict import TensorDict

from datamodules.sampling import Futures, UniformBatches

LENGTHS = torch.tensor([1, 5, 400])
LAST = (LENGTHS.cumsum(0) - 1).repeat_interleave(LENGTHS)
PLACE = torch.arange(len(LAST)).float().unsqueeze(-1)


def test_futures_are_geometrically_later_and_end_with_the_episode():
    index = torch.tensor([[0, 3], [6, 405]])
    drawn = Futures(PLACE, LAST, 4000, 0.9).draw(index, torch.Generator().manual_seed(0))[..., 0]
    assert (drawn[0, 0] == 0).all()  # an episode of one transition
    assert (drawn[1, 1] == 405).all()  # the last
    shares = torch.bincount((drawn[0, 1] - 3).long(), minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.09, 0.81]), atol=0.02, rtol=0)
    later = drawn[1, 0] - 6
    assert abs(later.mean() - 9) < 0.5  # discount / (1 - discount)
    assert abs((later == 0).float().mean() - 0.1) < 0.02


def test_futures_share_a_delay_of_any_order():
    index = torch.full((20_000,), 6)
    drawn = Futures(PLACE, LAST, 2, 0.0, delay=7).draw(index, torch.Generator().manual_seed(0))[..., 0] - 6
    assert (drawn[:, 0] == drawn[:, 1]).all()
    shares = torch.bincount(drawn[:, 0].long(), minlength=8) / len(index)
    steps = torch.arange(8.0)
    expected = ((steps + 2) / (steps + 1)).log() / torch.tensor(9.0).log()
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    later = Futures(PLACE, LAST, 1, 0.5, delay=7).draw(index, torch.Generator().manual_seed(0))[..., 0] - 6
    assert abs(later.mean() - drawn.mean() - 1) < 0.1  # discount / (1 - discount) more


def test_no_discount_is_the_very_next_state():
    index = torch.arange(len(LAST))
    drawn = Futures(PLACE, LAST, 3, 0.0).draw(index, torch.Generator().manual_seed(0))
    assert (drawn[..., 0] == index[:, None]).all()


def test_batches_bring_what_follows_their_rows_and_are_the_same_without():
    data = TensorDict({"observation": PLACE, "next": {"observation": PLACE + 0.5}}, batch_size=[len(LAST)])
    futures = Futures(data["next", "observation"], LAST, 2, 0.5)
    plain, more = (UniformBatches(data, 16, 2, 0, 8, 3, each) for each in (None, futures))
    for one, other in zip(plain, more, strict=True):
        assert (one["observation"] == other["observation"]).all()
        future = other["next", "future"]
        assert future.shape == (2, 16, 2, 1)
        assert (future >= other["next", "observation"].unsqueeze(-2)).all()
        assert (LAST[future.long()] == LAST[other["observation"].long()].unsqueeze(-2)).all()
