"""What may be built on the word of a file: a checkpoint names classes and functions, and may come from anybody."""

from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made", bound=Callable)
MARK = "__buildable__"


def buildable(*, writes: str | None = None) -> Callable[[Made], Made]:
    """Mark a function, or a class and all that derive from it, as one that a checkpoint may name.

    Networks, environments, datamodules and optimisers need no mark. Everything else does: without one, only a person
    can name it. What is marked must do no harm whatever it is called with: it makes an object, and writes to no file
    outside of the folder that is its argument `writes`, which an evaluation compares with where it may write.
    """

    def mark(made: Made) -> Made:
        setattr(made, MARK, writes)
        return made

    return mark
