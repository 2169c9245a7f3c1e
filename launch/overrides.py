"""The text of overrides: what they set, and how they are written so that Hydra and a shell read what is meant."""

import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString

SEARCH_PATH = "hydra.searchpath"
"""Folders of configurations beside the project's own."""
WHERE = ("experiment", "seed", "output_root", "data_root", "ckpt_path", "logger", "hydra", "trust")
TELLING = (
    "name",
    "summary",
    "duration",
    "notes",
    "training_curves",
    "curves_against",
    "objective",
    "aggregate",
    "contrasts",
)
NEUTRAL = (*WHERE, *TELLING)
"""The first words of overrides that change neither what an experiment is nor how long it takes."""

HARMLESS = re.compile(r"\$\{(sum:)?[\w.,\[\] -]*\}")
"""Interpolations that do nothing but to look up and to add."""

TYPED: list[str] = []
"""The command line as a person gave it, before it was completed by what a run's folder remembers."""


def override_key(override: str) -> str:
    """What an override sets, adds or deletes: `module.updates` of `++module.updates=3`."""
    return override.split("=", 1)[0].lstrip("+~")


def sets_hydra(override: str) -> bool:
    """Whether an override is of Hydra itself, which would call what it is told before anything is checked."""
    return "hydra" in re.split(r"[/@.:]", override_key(override))


def check_resolvers(config: Any, overrides: Sequence[str], where: str, typed: Sequence[str]) -> None:
    """Raise a ValueError if looking a run's values up would call something that might read or write.

    Args:
        config: as `overrides` compose it, with its interpolations.
        where: the file that the overrides come from, for the error.
        typed: overrides of a person, which may call what they like; so may files in folders that are among them.
    """
    _check_values(list(overrides), where, typed)
    if given_value(typed, SEARCH_PATH) is None:
        _check_values(config, where, typed)


def _check_values(node: Any, where: str, typed: Sequence[str]) -> None:
    if isinstance(node, Mapping):
        for name, value in node.items():
            _check_values(name, where, typed)
            _check_values(value, where, typed)
    for value in node if isinstance(node, list | tuple) else ():
        _check_values(value, where, typed)
    if not isinstance(node, str) or any(node in override for override in typed):
        return
    text, before = node, ""
    while text != before:  # from the inside to the outside
        text, before = HARMLESS.sub("x", text), text
    if "${" in text:
        raise ValueError(
            f"{where}: expected values and references, found {node[:80]}, which calls something; if it is yours, type "
            "it or --config-dir again."
        )


def departures(overrides: Sequence[str], neutral: Collection[str]) -> list[str]:
    """Those overrides whose first word is none of the neutral ones: where a run departs from the experiment.

    Of those of one key the last one counts.
    """
    last = {override_key(override): override for override in overrides}
    return [override for key, override in last.items() if re.split(r"[./@]", key)[0] not in neutral]


def given_value(overrides: Sequence[str], key: str) -> Any:
    """What the last override of a key gives it, a sweep as it is written; None without one."""
    given = [override for override in overrides if override_key(override) == key and "=" in override]
    if not given:
        return None
    parsed = OverridesParser.create().parse_override(given[-1])
    return given[-1].split("=", 1)[1] if parsed.is_sweep_override() else parsed.value()


def quoted(text: str) -> str:
    """A value that Hydra reads as exactly this text."""
    if re.fullmatch(r"/[\w./+-]*", text, re.ASCII):
        return text
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return QuotedString(escaped, Quote.double).with_quotes()


def command(name: str, arguments: Sequence[str], packages: Collection[str] = ()) -> str:
    """The command that trains or evaluates with these arguments, as it can be pasted into a shell.

    Args:
        packages: a person's own, which Python has to find.
    """
    found_by = os.environ.get("PYTHONPATH") if packages else None
    return f"{f'PYTHONPATH={shlex.quote(found_by)} ' if found_by else ''}{program(name)} {shlex.join(arguments)}"


def program(name: str) -> str:
    """What trains or evaluates, as a shell calls it from where it was called: an installation has no scripts."""
    called = Path(sys.argv[0])
    if called.name.startswith("tenfold-"):
        return f"tenfold-{name}"
    folder = called.parent if called.name in ("train.py", "evaluate.py") else Path()
    return f"python {shlex.quote(str(folder / f'{name}.py'))}"
