"""The number that a search asks a study for."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from lightning.pytorch.utilities import rank_zero_only

from components.files import read_json
from components.structure import NUMBER
from launch.recipes import foreign_packages
from launch.values import one_of


def objective_known(objective: str, arms: Iterable[Mapping[str, Any]]) -> bool:
    """Whether it is sure before training that an arm's evaluation will measure what is searched for.

    Args:
        arms: the configuration of each one's parts.

    Raises:
        ValueError: it is sure that none will.
    """
    names: list[str] = []
    told = "/" in objective.removeprefix("eval/")  # names without are the method's own
    for parts in arms:
        if not hasattr(get_object(parts["datamodule"]["_target_"]), "metric_names") or foreign_packages(parts):
            told = False
            continue
        names += instantiate(parts["datamodule"]).metric_names
        for callback in filter(None, parts["callbacks"].values()):
            names += getattr(get_object(callback["_target_"]), "metric_names", ())
    known = any(fnmatchcase(name, pattern) for name in _meant(objective) for pattern in names)
    if told and not known:
        raise _not_measured(objective, names)
    return known


def metrics_meant(objective: str, arms: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What those arms that have it measured of an objective.

    Raises:
        ValueError: none has it.
    """
    found = [next((metrics[name] for name in _meant(objective) if name in metrics), None) for metrics in arms.values()]
    if found == [None] * len(found):
        raise _not_measured(objective, (name for metrics in arms.values() for name in metrics))
    return [each for each in found if each is not None]


@rank_zero_only  # which alone writes the results
def objective_value(objective: str, folder: Path, arms: Iterable[str]) -> float:
    """The mean of a metric over the seeds of a study and over those arms that have it."""
    found = read_json(folder / "results.json", {"arms": {str: {str: {"mean": NUMBER}}}})["arms"]
    means = [value["mean"] for value in metrics_meant(objective, {arm: found[arm] for arm in arms})]
    return sum(means) / len(means)


def _meant(objective: str) -> tuple[str, str]:
    """Metrics that an objective may name: the report leaves out that they are returns."""
    name = objective.removeprefix("eval/")
    return name, f"{name}/return"


def _not_measured(objective: str, names: Iterable[str]) -> ValueError:
    known = [f"eval/{name}" for name in dict.fromkeys(names)]
    return ValueError(f"objective={objective}: expected a metric of the evaluation, {one_of(known, objective)}.")
