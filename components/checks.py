"""Checks of arguments that a user sets."""


def check_counts(**counts: int) -> None:
    """Raise a ValueError naming the first of `counts` that is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1.")
