"""What runs went on with that they did not begin with."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from components.structure import COUNT
from components.wording import counted

PARTS = ("module", "datamodule", "trainer")
"""Of a recipe, what a run's numbers depend on."""
RESUMED = [{"run": str, "updates": COUNT, "changes": {str: {"before": object, "now": object}}}]
"""Of runs by their names, as ARM/seed_K: what was changed after how many updates."""


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration, by its key in dotted form."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def changes(saved: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What differs between the recipe of a checkpoint and that of the run that goes on from it, by key.

    An older checkpoint says nothing of some parts.
    """
    parts = [part for part in PARTS if part in saved]
    before, now = (dict(leaves({part: each[part] for part in parts})) for each in (saved, recipe))
    return {
        key: {"before": before.get(key), "now": now.get(key)}
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    }


def in_words(changed: Mapping[str, Mapping[str, Any]]) -> str:
    """The end of a sentence on a run that goes on; nothing where nothing was changed."""
    each = [f"{key}={_text(values['now'])} (was {_text(values['before'])})" for key, values in changed.items()]
    return f" with {', '.join(each)}" if each else ""


def history(
    former: Sequence[Mapping[str, Any]], run: str, saved: Mapping[str, Any] | None, recipe: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """What was changed until now, when a run goes on.

    Args:
        former: what was changed before, in all runs.
        saved: the recipe of the run's checkpoint and the updates that it has made; None of a run that begins anew.
        recipe: what the run goes on with.
    """
    kept = [one for one in former if one["run"] != run]
    if saved is None:
        return kept
    settings, updates = dict(leaves(saved["recipe"])), saved["updates"]
    for one in former:
        # A resumption that was stopped before it took a checkpoint has changed nothing.
        held = all(settings.get(key) == values["now"] for key, values in one["changes"].items())
        if one["run"] == run and (one["updates"] < updates or (one["updates"] == updates and held)):
            kept.append(one)
    changed = changes(saved["recipe"], recipe)
    return [*kept, {"run": run, "updates": updates, "changes": changed}] if changed else kept


def sentences(resumed: Sequence[Mapping[str, Any]], runs: int) -> list[str]:
    """One for each change, which names those of a study's runs that it was made in, where it has several."""
    told: dict[tuple[int, str], list[str]] = {}
    for one in resumed:
        told.setdefault((one["updates"], in_words(one["changes"])), []).append(one["run"])
    whose = {each: f" ({', '.join(names)})" if runs > 1 else "" for each, names in told.items()}
    return [f"Resumed{whose[updates, what]} after {counted(updates, 'update')}{what}." for updates, what in told]


def _text(value: Any) -> str:
    """As it would be typed."""
    return value if isinstance(value, str) else json.dumps(value)
