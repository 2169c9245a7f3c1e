"""Whether what was read from a file has the parts that it must have, before anything is done with it."""

from collections.abc import Mapping
from typing import Any

COUNT = range(2**63)
NUMBER = (int, float)


def check_structure(found: Any, expected: Any, where: str) -> None:
    """Raise a ValueError unless data have the structure that is expected; names the first part that has not.

    Args:
        found: as it was read.
        expected: a type; a range, for a whole number in it; a tuple, for any of its structures (None among them); a
            list of one structure, for a list of such; a dictionary of the parts that there must be by their names, or
            of one type and one structure, for parts of any name of this type.
        where: the file, and the part of it that `found` is.
    """
    if isinstance(expected, Mapping):
        _check_type(found, Mapping, where)
        kind = next((name for name in expected if isinstance(name, type)), None)
        for name in expected if kind is None else found:
            if name not in found:
                raise ValueError(f"{where}: expected {name}, found none.")
            if kind is not None:
                _check_type(name, kind, f"{where}, the name {str(name)[:40]}")
            check_structure(found[name], expected[name if kind is None else kind], f"{where}.{name}")
    elif isinstance(expected, list):
        _check_type(found, (list, tuple), where)
        for index, item in enumerate(found):
            check_structure(item, expected[0], f"{where}[{index}]")
    elif isinstance(expected, range):
        if isinstance(found, bool) or not isinstance(found, int) or found not in expected:
            raise ValueError(f"{where}: expected a whole number from {expected[0]}, found {str(found)[:40]}.")
    elif isinstance(expected, tuple):
        structures = [each for each in expected if each is not None and not isinstance(each, type)]
        types = tuple(type(None) if each is None else each for each in expected if each not in structures)
        if structures and not isinstance(found, types):
            check_structure(found, structures[0], where)
        elif not structures:
            _check_type(found, types, where)
    else:
        _check_type(found, expected, where)


def _check_type(found: Any, kind: Any, where: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds and object not in kinds):
        names = " or ".join("nothing" if each is type(None) else each.__name__ for each in kinds)
        raise ValueError(f"{where}: expected {names}, found {type(found).__name__}.")
