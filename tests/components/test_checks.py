"""Ranges beside arguments: what is refused, in which words, and what is let through."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import numpy as np
import pytest
from omegaconf import OmegaConf

from components.checks import Count, Momentum, NonNegative, Number, Positive, Range, Seed, Share, Size, checked

NAN, INFINITE = float("nan"), float("inf")


@checked
class Part:
    """Takes every kind of annotation; its body must not be reached with a wrong number."""

    made = 0

    def __init__(
        self,
        size: Size = 1,
        count: Count | None = None,
        *,
        share: Share = 0.5,
        momentum: Momentum = 0.0,
        positive: Positive = 1.0,
        weight: NonNegative | None = None,
        number: Number = 0.0,
        seed: Seed = 0,
        upto: Annotated[float, Range(most=0)] = -1.0,
        sizes: Sequence[Size] = (),
        ends: tuple[Number, Number] = (0.0, 1.0),
        shares: Mapping[str, Share] | None = None,
        mean: Sequence[Number] | Number = 0.5,
        devices: Annotated[int, Range(-1, 8)] | str = "auto",
        free: float = 0.0,
    ) -> None:
        type(self).made += 1
        self.size = size


@checked
@dataclass
class Fields:
    share: Share = 0.5


@checked
def scaled(by: Positive, free: float) -> float:
    return by * free


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", 0, "at least 1"),
        ("size", 99999999999, "at most 65536"),
        ("size", 10**400, "at most 65536"),
        ("size", 0.5, "a whole number"),
        ("size", NAN, "a whole number"),
        ("size", True, "a whole number"),
        ("size", "3", "a whole number"),
        ("size", None, "a whole number"),
        ("count", -1, "at least 1"),
        ("count", 2**31, "at most 2147483647"),
        ("share", 2, "at most 1"),
        ("share", -1e-9, "at least 0"),
        ("share", NAN, "a finite number"),
        ("share", False, "a number"),
        ("momentum", 1.0, "less than 1"),
        ("positive", 0.0, "more than 0"),
        ("positive", INFINITE, "a finite number"),
        ("weight", -1.0, "at least 0"),
        ("number", -INFINITE, "a finite number"),
        ("number", 1e39, "at most 3.4028234e+38"),  # infinite in float32
        ("seed", 2**32, "at most 4294967295"),
        ("upto", 0.5, "at most 0"),
        ("ends", [1, 2, 3], "2 numbers"),
        ("devices", -2, "at least -1"),
    ],
)
def test_a_number_out_of_its_range_is_one_sentence(name, value, expected):
    made = Part.made
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value}: expected {expected}.')}$"):
        Part(**{name: value})
    assert Part.made == made


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sizes", [1, 0], r"sizes\[1\]=0: expected at least 1"),
        ("sizes", ["two"], r"sizes\[0\]=two: expected a whole number"),
        ("ends", (0.0, NAN), r"ends\[1\]=nan: expected a finite number"),
        ("mean", [NAN], r"mean\[0\]=nan: expected a finite number"),
        ("mean", INFINITE, "mean=inf: expected a finite number"),
        ("shares", {"a": 0.5, "b": 2}, r"shares\.b=2: expected at most 1"),
    ],
)
@pytest.mark.parametrize("made", [lambda value: value, lambda value: OmegaConf.create([value])[0]])
def test_lists_and_dictionaries_are_gone_through(name, value, message, made):
    with pytest.raises(ValueError, match=f"^{message}"):
        Part(**{name: made(value)})


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 65536, "count": None, "weight": None, "shares": None},
        {"size": np.int64(3), "share": np.float32(0.5), "number": Fraction(1, 3)},
        {"share": 1, "positive": 1, "momentum": 0},  # whole numbers are numbers
        {"sizes": (2, 3), "ends": [0, 1], "shares": {}, "mean": (1, 2.5)},
        {"devices": "auto", "free": NAN},  # what has no range is the class' own business
    ],
)
def test_what_makes_sense_passes(arguments):
    assert isinstance(Part(**arguments), Part)


def test_positions_dataclasses_functions_and_subclasses():
    class Below(Part):
        def __init__(self, **settings: int) -> None:
            super().__init__(**settings)

    for call, message in [
        (lambda: Part(1, 0), "count=0: expected at least 1"),
        (lambda: Below(size=0), "size=0: expected at least 1"),
        (lambda: Fields(2), "share=2: expected at most 1"),
        (lambda: scaled(-1, free=2), "by=-1: expected more than 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert (Part(3).size, Fields(1).share, scaled(3, 2)) == (3, 1, 6)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'free'"):
        scaled(1)


@checked
def several(first: Positive, *sizes: Size, kept: Share = 0.0, **weights: NonNegative) -> tuple:
    return first, sizes, kept, weights


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0.0,), {}, "first=0.0: expected more than 0."),
        ((1.0, 1, 0), {}, "sizes=0: expected at least 1."),
        ((1.0, 1, 1), {"kept": 2}, "kept=2: expected at most 1."),
        ((1.0,), {"of_x": -1}, "of_x=-1: expected at least 0."),
    ],
)
def test_arguments_without_names_are_those_that_they_are_given_to(args, kwargs, message):
    assert several(2.0, 3, 70, kept=0.5, x=1000) == (2.0, (3, 70), 0.5, {"x": 1000})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        several(*args, **kwargs)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'first'"):
        several()
    with pytest.raises(TypeError, match="multiple values"):
        several(1.0, first=-1.0)


def test_annotations_that_a_module_keeps_as_text_count():
    module = """
from __future__ import annotations
from typing import TYPE_CHECKING
from components.checks import Share, checked
if TYPE_CHECKING:
    from somewhere import Thing
@checked
class Late:
    def __init__(self, other: Thing | None = None, share: Share = 0.5) -> None: ...
"""
    namespace = {}
    exec(compile(module, "late", "exec"), namespace)
    namespace["Late"](share=1.0)
    with pytest.raises(ValueError, match=r"^share=2: expected at most 1\.$"):
        namespace["Late"](share=2)
