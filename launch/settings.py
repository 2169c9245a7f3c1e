"""Whether what an experiment and a person set makes sense, before anything is built."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from components.checks import Number, Seed, Size, check_range
from launch.errors import CommandLineError
from launch.experiments import options_with
from launch.overrides import SEARCH_PATH, given_value, override_key
from launch.runs import check_folder_name
from launch.values import check_types

TOP_LEVEL = {
    "name": str,
    "summary": str,
    "duration": str,
    "notes": list[str],
    "training_curves": list[str],
    "curves_against": str | None,
    "objective": str | None,
    "aggregate": str | None,
    "contrasts": Mapping[str, Mapping[str, Number]],
    "seed": Seed,
    "num_seeds": Size,
    "threads": Size | None,
    "ckpt_path": str | None,
    "init_from": str | None,
    "init_parts": list[str] | None,
    "output_root": str,
    "data_root": str,
    "trust": str | list[str] | None,
}
"""What the top-level keys of configs/train.yaml hold, but for those of groups and `arms`."""
BUILT = ("module", "datamodule", "trainer", "callbacks", "logger")
"""The parts of a run that are built."""


def searches() -> bool:
    """Whether the program is one of a search for the best values."""
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and hydra.runtime.choices["hydra/sweeper"] != "basic"


def parts_of(config: DictConfig) -> dict[str, Any]:
    """Those of a run that are built."""
    return {name: OmegaConf.to_container(config[name], resolve=True) for name in BUILT if config[name] is not None}


def check_parts(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise a ValueError unless a run has what every run has, and what it has can be built."""
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    for part in BUILT:
        found = config.get(part)
        where = part if part in ("callbacks", "logger") else f"{part}._target_"
        if OmegaConf.select(config, where) is None:
            raise ValueError(
                f"experiment={experiment}: expected a {part} among its defaults, as in `- override /{part}: NAME`, or "
                f"under {where}, found {found}."
            )
    for group in ("callbacks", "logger"):
        for name, part in config[group].items():
            if part is not None and not (isinstance(part, DictConfig) and "_target_" in part):
                key = f"{group}.{name}"
                options = options_with(group, f"{name}._target_", given_value(overrides, SEARCH_PATH) or ())
                chosen = f", or choose an option that brings it: {group}={'|'.join(options)}" if options else ""
                raise ValueError(
                    f"{key}: expected a part with its _target_, found {part}; leave it out with {key}=null{chosen}."
                )


def check_settings(config: DictConfig, overrides: Sequence[str]) -> None:
    """Check what holds for all runs, before any is composed.

    Raises:
        CommandLineError, ValueError: names the key, what was expected and what was found.
    """
    check_types(config, TOP_LEVEL)
    for name, weights in config.contrasts.items():
        if not isinstance(weights, DictConfig):
            raise ValueError(f"contrasts.{name}={weights}: expected ARM: WEIGHT pairs, as in {{ARM: 1, OTHER: -1}}.")
    check_folder_name("name", config.name)
    if not config.data_root or "${" in config.data_root:
        raise ValueError(f"data_root={config.data_root!r}: expected the path of a folder.")
    for key in {"run_dir", "study_dir", "arm"}.intersection(map(override_key, overrides)):
        raise CommandLineError(f"{key}: expected nothing, for the program sets it; output_root says where runs go.")
    if config.init_parts and config.init_from is None:
        raise CommandLineError(f"init_parts={config.init_parts}: expected together with init_from, found without.")
    check_range("seed + num_seeds - 1", config.seed + config.num_seeds - 1, Seed)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if override.value() == {} and not override.is_add() and OmegaConf.select(config, key):
            raise CommandLineError(f"{key}={{}}: expected null, or keys one by one; a dictionary is merged into {key}.")
    if searches() and config.objective is None:
        raise CommandLineError("objective=null: expected eval/METRIC, the number that the search is for.")
