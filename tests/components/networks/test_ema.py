import torch

from components.networks.ema import polyak_update


def test_targets_move_the_given_fraction():
    target, source = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]
    polyak_update(target, source, 0.25)
    assert torch.equal(target[0], torch.full((2,), 0.25))
    assert torch.equal(target[1], torch.full((3,), 0.75))
