"""What one module takes of another's state."""

import pytest
import torch

from components.networks.states import select


def state(**sizes: int) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.randn(size) for name, size in sizes.items()}


OWN = state(encoder__a=2, encoder_head=3, critic__w=4, target_critic__w=4, actor__w=5, target_actor__w=5)


@pytest.mark.parametrize(
    ("saved", "parts", "expected"),
    [
        (OWN, None, {name: name for name in OWN}),
        (OWN, ["encoder"], {"encoder.a": "encoder.a"}),  # a part's name is whole words
        (OWN, ["critic"], {"critic.w": "critic.w", "target_critic.w": "target_critic.w"}),
        (state(actor__w=5), ["actor"], {"actor.w": "actor.w", "target_actor.w": "actor.w"}),  # a target where was none
        (state(encoder__a=2, target_encoder__a=2, x=1), ["encoder"], {"encoder.a": "encoder.a"}),  # and none where was
        (state(actor__w=5, critic__w=9), ["actor.w"], {"actor.w": "actor.w", "target_actor.w": "actor.w"}),
    ],
)
def test_parts_that_are_taken(saved, parts, expected):
    taken = select(saved, OWN, parts)
    assert taken.keys() == expected.keys()
    assert all(taken[name] is saved[source] for name, source in expected.items())


@pytest.mark.parametrize(
    ("saved", "parts", "message"),
    [
        (
            {**OWN, **state(actor__w=6)},
            None,
            r"actor\.w is \[6\], expected \[5\]; what fits is init_parts=\[encoder,enc",
        ),
        (
            {**OWN, **state(more__w=6)},
            None,
            r"more\.w is \[6\], expected nothing; what fits .*, without more, for which there is no place here\.",
        ),
        (
            state(encoder__a=2),
            ["encoder", "critic"],
            r"critic\.w is nothing, expected \[4\]; what fits .*=\[encoder\]\.",
        ),
        (state(actor__w=6), None, r"encoder\.a is nothing, expected \[2\]; no part of it fits\.$"),
        ({**OWN, **state(actor__b=6)}, ["actor"], r"actor\.b is \[6\], expected nothing"),
        (
            OWN,
            ["decoder"],
            "init_parts=decoder: expected a part such as encoder, encoder_head, critic, actor, found none",
        ),
    ],
)
def test_what_does_not_fit_is_named(saved, parts, message):
    with pytest.raises(ValueError, match=message):
        select(saved, OWN, parts)
