"""What of a study is done already, and whether it was done as it is asked for now."""

import os
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from launch.arms import Run
from launch.files import read_results
from launch.resumptions import PARTS, leaves
from launch.values import set_by


def is_finished(run: Run, config: DictConfig) -> bool:
    """Whether the run has its results, and they are of as many updates as are asked for now."""
    return run.results.exists() and read_results(run.results)["updates"] >= config.module.updates


def check_updates(run: Run, config: DictConfig, done: int) -> None:
    """Raise a ValueError if a run has made more updates than are asked for: no report could say so of it."""
    asked = config.module.updates
    if done > asked:
        key = set_by(config, "module.updates")
        raise ValueError(
            f"{key}={asked}: expected at least {done}, which {run.arm}, seed {run.seed} has made; start anew without "
            "ckpt_path."
        )


def check_finished(runs: list[Run], pending: list[Run], configs: Mapping[Run, DictConfig]) -> None:
    """Raise a ValueError if results that would be kept were made in another way than is asked for now."""
    exceeded = {run: f"{run.folder}{os.sep}" for run in pending if run.results.exists()}
    made_with = ("module", "datamodule") if pending else PARTS  # what is left to do may be done on another machine
    for run in runs:
        if run in pending:
            continue
        advice = f"start anew without ckpt_path, or delete {run.results}"
        results = read_results(run.results)
        check_updates(run, configs[run], results["updates"])
        saved = results["recipe"] or {}
        now = OmegaConf.to_container(configs[run], resolve=True)
        before, asked = (dict(leaves({part: each.get(part) for part in made_with})) for each in (saved, now))
        for key in [key for key in asked if key in before and key != "module.updates"]:
            moved = str(run.folder.parents[1]) in str(asked[key])  # a path in the study's own folder
            if before[key] != asked[key] and not moved:
                raise ValueError(
                    f"{run.arm}, seed {run.seed} is finished: expected {set_by(configs[run], key)}={before[key]}, with "
                    f"which it was run, found {asked[key]}; {advice}."
                )
        for other, folder in exceeded.items():
            if any(folder in str(value) for value in asked.values()):
                raise ValueError(
                    f"{other.arm}, seed {other.seed} would go on beyond what {run.arm} was made with: {advice}."
                )
