"""The runs that an experiment consists of: every arm with every seed, and what each is configured as."""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from launch.checkpoints import LAST
from launch.choices import check_choices, check_used
from launch.errors import CommandLineError
from launch.experiments import keys_of
from launch.overrides import NEUTRAL, override_key, sets_hydra
from launch.runs import check_folder_name
from launch.settings import BUILT


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}/seed_{self.seed}"

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    def log(self, group: str) -> Path:
        """What was recorded of a group of metrics, ``train`` or ``eval``."""
        return self.folder / f"{group}.csv"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / LAST


def arms_of(config: DictConfig) -> dict[str, list[str]]:
    """Every arm's overrides, without arms that are null; without any, the experiment itself is the only one."""
    arms = OmegaConf.to_container(config)["arms"]  # as text: an interpolation among them is resolved for each run
    if not isinstance(arms, dict | None):
        raise CommandLineError(f"arms={arms}: expected null, or arms with lists of overrides by their names.")
    for name, overrides in (arms or {}).items():
        check_folder_name("arms", name)
        if overrides is not None and not (isinstance(overrides, list) and all(isinstance(o, str) for o in overrides)):
            raise CommandLineError(
                f"arms.{name}={overrides}: expected null, or a list of overrides such as ['module.updates=1000']."
            )
        for override in filter(sets_hydra, overrides or ()):
            raise CommandLineError(f"arms.{name}: expected overrides of this experiment, found {override} of Hydra.")
    return {name: overrides for name, overrides in (arms or {}).items() if overrides is not None} or {config.name: []}


def runs_of(config: DictConfig, folder: Path) -> Iterator[Run]:
    for seed in range(config.seed, config.seed + config.num_seeds):
        for arm in arms_of(config):
            yield Run(arm, seed, folder / arm / f"seed_{seed}")


def run_configs(runs: Sequence[Run], config: DictConfig, overrides: list[str]) -> dict[Run, DictConfig]:
    """The configuration of every run: the experiment's, then the arm's overrides, then the user's.

    An arm is composed once for all seeds: that takes a tenth of a second or two.

    Args:
        config: what the user's `overrides` compose, without an arm's.
    """
    arms = arms_of(config)
    composed = {arm: _arm_config(arm, arms, overrides) for arm in dict.fromkeys(run.arm for run in runs)}
    check_used(list(composed.values()), overrides, (*BUILT, *NEUTRAL, "arms"))
    configs = {run: copy.deepcopy(composed[run.arm]) for run in runs}
    for run, own in configs.items():
        own.seed = run.seed
        own.run_dir = str(run.folder)
        own.study_dir = str(run.folder.parents[1])
        own.arm = run.arm
    return configs


def _arm_config(arm: str, arms: Mapping[str, list[str]], overrides: list[str]) -> DictConfig:
    try:
        config = compose("train", [*arms[arm], *overrides])
    except ConfigCompositionException as error:
        unknown = re.search(r"Could not override '([^']+)'", str(error))
        if unknown is None:
            raise
        if unknown[1] in map(override_key, arms[arm]):
            close = difflib.get_close_matches(unknown[1], keys_of(compose("train", overrides)), n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise CommandLineError(
                f"arms.{arm}: expected keys of this experiment, found {unknown[1]}.{meant}"
            ) from error
        if len(arms) == 1:
            raise
        raise CommandLineError(
            f"{unknown[1]}: what is typed holds for all arms, and the arm {arm} has no such key; leave it out with "
            f"arms.{arm}=null, or give it to one arm, as in '+arms.mine=[\"{unknown[1]}=VALUE\"]'."
        ) from error
    check_choices(config, [*arms[arm], *overrides])
    return config


def replaced(config: DictConfig, overrides: list[str]) -> list[str]:
    """Says which arms are not what they were called for."""
    sentences = []
    for key, override in {override_key(override): override for override in overrides}.items():
        arms = arms_of(config).items()
        replaced = [arm for arm, own in arms if any(override_key(o) == key and o != override for o in own)]
        if replaced:
            sentences.append(f"{override} holds for all arms, also for {', '.join(replaced)}, which had their own.")
    return sentences
