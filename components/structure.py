"""Whether what was read from a file has the parts that it must have, before anything is done with it."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

COUNT = range(2**63)
NUMBER = float

_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", None: "nothing"}


def check_structure(found: Any, expected: Any, where: str) -> None:
    """Raise a ValueError unless data have the structure that is expected; names the first part that has not.

    Args:
        found: as it was read.
        expected: a type, where float is for any finite number; a range, for a whole number in it; a tuple, for any of
            its structures (None among them); a list of one structure, for a list of such, and with an ellipsis behind
            it for at least one; a dictionary of the parts that there must be by their names, or of one type and one
            structure, for parts of any name of this type.
        where: the file, and the part of it that `found` is.
    """
    if isinstance(expected, tuple):
        near = [each for each in expected if _is_like(found, each)]
        if len(near) > 1:  # alike outside
            near = [each for each in near if _fits(found, each)] or near
        if not near:
            raise _fault(found, expected, where)
        check_structure(found, near[0], where)
    elif not _is_like(found, expected):
        raise _fault(found, expected, where)
    elif isinstance(expected, Mapping):
        kind = next((name for name in expected if isinstance(name, type)), None)
        for name in expected if kind is None else found:
            if name not in found:
                raise ValueError(f"{where}: expected {name}, found none.")
            if kind is not None and not _is_like(name, kind):
                raise _fault(name, kind, f"{where}, the name {str(name)[:40]}")
            check_structure(found[name], expected[name if kind is None else kind], f"{where}.{name}")
    elif isinstance(expected, list):
        if len(found) < len(expected) - 1:
            raise ValueError(f"{where}: expected at least one, found none.")
        for index, item in enumerate(found):
            check_structure(item, expected[0], f"{where}[{index}]")


def _fits(found: Any, expected: Any) -> bool:
    try:
        check_structure(found, expected, "")
    except ValueError:
        return False
    return True


def _is_like(found: Any, expected: Any) -> bool:
    """The same for what it is itself, whatever is in it."""
    if expected is None:
        return found is None
    if isinstance(expected, Mapping | list):
        return isinstance(found, Mapping if isinstance(expected, Mapping) else list | tuple)
    if isinstance(found, bool):
        return expected in (bool, object)
    if isinstance(expected, range):
        return isinstance(found, int) and found in expected
    if expected is float:
        return isinstance(found, int | float) and abs(found) <= sys.float_info.max
    return isinstance(found, expected)


def _fault(found: Any, expected: Any, where: str) -> ValueError:
    plain = found is not None and not isinstance(found, Mapping | Iterable)
    read = str(found)[:40] if plain else _named(type(found)) if found is not None else "nothing"
    return ValueError(f"{where}: expected {_named(expected)}, found {read}.")


def _named(expected: Any) -> str:
    if isinstance(expected, tuple):
        return " or ".join(map(_named, expected))
    if isinstance(expected, range):
        return f"a whole number from {expected[0]} to {expected[-1]}"
    if isinstance(expected, Mapping) or (isinstance(expected, type) and issubclass(expected, Mapping)):
        return "values by their names"
    if isinstance(expected, list) or expected in (list, tuple):
        return "a list"
    return _WORDS.get(expected, f"a {getattr(expected, '__name__', expected)}")
