"""Checks of arguments that a user sets."""

from collections.abc import Sequence


def check_counts(**counts: int) -> None:
    """Raise a ValueError naming the first of `counts` that is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1.")


def vector_size(observation_shape: Sequence[int]) -> int:
    """The size of observations that are vectors; a ValueError if they are not."""
    if len(observation_shape) != 1:
        raise ValueError(
            f"observation_shape={list(observation_shape)}: expected vectors; pictures need an encoder, as in "
            "module=drq."
        )
    return observation_shape[0]
