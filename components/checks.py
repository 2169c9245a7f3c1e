"""Ranges of the numbers that a user sets: declared once, beside the arguments, and checked before anything is made.

@checked
class Critic(nn.Module):
    def __init__(self, width: Size = 256, dropout: Share = 0.0, clip: Positive | None = None) -> None: ...

Critic(dropout=2)  # ValueError: dropout=2: expected at most 1.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import starmap
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

Called = TypeVar("Called", bound=Callable[..., Any])

_LARGEST = 3.4028234e38  # that float32 holds


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; `above` and `below` are bounds that are not among them."""

    least: float = -_LARGEST
    most: float = _LARGEST
    above: float = -math.inf
    below: float = math.inf

    def expected(self, value: Real) -> str | None:
        """What would have been inside, in words; None for a value that is."""
        if not -math.inf < value < math.inf:
            return "a finite number"
        if self.least == self.most != value:
            return f"{self.most}"
        if value < self.least:
            return f"at least {self.least:.10g}"
        if value > self.most:
            return f"at most {self.most:.10g}"
        if value <= self.above:
            return f"more than {self.above:.10g}"
        return f"less than {self.below:.10g}" if value >= self.below else None


# Of what memory or time is a multiple of: widths, depths, batches, environments.
Size = Annotated[int, Range(1, 2**16)]
SizeOrZero = Annotated[int, Range(0, 2**16)]
# Of what happens one after the other, or of bytes and rows.
Count = Annotated[int, Range(1, 2**31 - 1)]
CountOrZero = Annotated[int, Range(0, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Number = Annotated[float, Range()]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(0, 1)]
LearningRate = Annotated[float, Range(0, 100)]  # some tens in published recipes of SGD, far below 1 in all others
Momentum = Annotated[float, Range(0, below=1)]  # what an average keeps of itself


def checked(called: Called) -> Called:
    """Decorate a function or class: numbers out of the ranges that its arguments are annotated with are ValueErrors."""
    if isinstance(called, type):
        called.__init__ = checked(called.__init__)
        return called
    signature = inspect.signature(called)
    ranges = {name: found for name, found in annotations(called).items() if has_range(found)}

    @wraps(called)
    def checking(*args: Any, **kwargs: Any) -> Any:
        for parameter, name, value in _given(signature, args, kwargs) if ranges else ():
            if parameter in ranges:
                check_range(name, value, ranges[parameter])
        return called(*args, **kwargs)

    return checking


def annotations(called: Callable[..., Any]) -> dict[str, Any]:
    """What the parameters are annotated with, also where a module has its annotations kept as text.

    Those that can't be read, being of names that are there for type checkers only, are left as text.
    """
    found = {name: each.annotation for name, each in inspect.signature(called).parameters.items()}
    namespace = getattr(inspect.unwrap(called), "__globals__", {})
    for name, annotation in found.items():
        if isinstance(annotation, str):
            with suppress(Exception):  # whatever evaluating an expression may raise
                found[name] = eval(annotation, namespace)
    return found


def _given(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, str, Any]]:
    """Parameters, names and values of what a call gives; nothing where that does not fit: it will be said by itself."""
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((name, name, each) for each in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from ((name, key, each) for key, each in value.items())
        else:
            yield name, name, value


def has_range(annotation: Any) -> bool:
    """Whether a range is declared in an annotation, for the value itself or for what is in it."""
    return get_origin(annotation) is Annotated or any(map(has_range, get_args(annotation)))


def check_range(name: str, value: Any, annotation: Any) -> None:
    """Raise a ValueError that begins with `name` unless a value is in the ranges of its annotation.

    So are the elements of lists and dictionaries. What no range is declared for passes.
    """
    fault = _fault(name, value, annotation) if has_range(annotation) else None
    if fault is not None:
        raise ValueError(fault)


def _fault(name: str, value: Any, annotation: Any) -> str | None:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        expected = _expected(value, *inner)
        return None if expected is None else f"{name}={value}: expected {expected}."
    if origin in (Union, UnionType):
        parts = [(name, value, each) for each in inner if isinstance(value, _class(each))]
    elif not inner or isinstance(value, str) or not isinstance(value, _class(annotation)):
        return None
    elif isinstance(value, Mapping):
        parts = [(f"{name}.{key}", each, inner[1]) for key, each in value.items()]
    else:
        kinds = inner if origin is tuple and inner[-1] is not ... else [inner[0]] * len(value)
        if len(kinds) != len(value):
            return f"{name}={list(value)}: expected {len(kinds)} numbers."
        parts = [(f"{name}[{index}]", *each) for index, each in enumerate(zip(value, kinds))]
    return next(filter(None, starmap(_fault, parts)), None)


def _expected(value: Any, kind: type, bounds: Range) -> str | None:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return "a whole number" if kind is int else "a number"
    return bounds.expected(value)


def _class(annotation: Any) -> type:
    """What a value has to be of for an annotation to be meant; any sequence does for a list or tuple."""
    origin = get_origin(annotation)
    return {Annotated: Real, list: Sequence, tuple: Sequence}.get(origin, origin or annotation)


def vector_size(observation_shape: Sequence[int]) -> int:
    """The size of observations that are vectors; a ValueError if they are not."""
    if len(observation_shape) != 1:
        raise ValueError(
            f"observation_shape={list(observation_shape)}: expected vectors; pictures need an encoder, as in "
            "module=drq."
        )
    return observation_shape[0]
