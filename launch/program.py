"""`train.py`: from a command line to a study.

A module of its own rather than the script: programs that a sweep's launchers start import it, and with it what
configurations call.
"""

import copy
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser  # the one that Hydra reads the command line with
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from launch.errors import CommandLineError, errors_past_hydra, is_first_process
from launch.experiments import CONFIGS, experiment_list, is_group, missing_folders
from launch.imports import import_lightning
from launch.overrides import (
    NEUTRAL,
    SEARCH_PATH,
    TYPED,
    check_resolvers,
    departures,
    given_value,
    override_key,
    program,
    quoted,
)
from launch.runs import RUN_FILE, merged, newest_run, remove_empty_folders, run_folder, run_of

SWEEP_FOLDER = "hydra.sweep.dir"

OmegaConf.register_new_resolver("experiment_list", experiment_list)
OmegaConf.register_new_resolver("train_program", lambda: program("train").replace("$", "$$"))  # part of a template
OmegaConf.register_new_resolver("sum", lambda numbers: sum(numbers.values() if hasattr(numbers, "values") else numbers))
OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True)  # names the time: one for the whole program


def main() -> None:
    """Train and evaluate what the command line asks for."""
    sys.argv[1:] = completed(sys.argv[1:])  # in place, for the processes that are started with the same command line
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(train)()
    finally:
        remove_empty_folders()


def train(config: DictConfig) -> float | None:
    """Say what is about to happen and how long it should take, and run a study; returns what a search asked for."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and given_value(sys.argv[1:], SWEEP_FOLDER) is None:
        # The other processes of a run are started with the same command line, and make the whole sweep beside this one.
        sys.argv.append(f"{SWEEP_FOLDER}={quoted(os.path.abspath(hydra_config.sweep.dir))}")
    with read_write(hydra_config):  # Lightning puts it between quotes, for the processes that it starts
        hydra_config.run.dir = quoted(hydra_config.runtime.output_dir).removeprefix('"').removesuffix('"')
    with errors_past_hydra():
        if Path(hydra_config.runtime.output_dir).resolve() == Path.cwd():
            raise CommandLineError("hydra.run.dir: expected a folder of the run's own, found the one it is started in.")
        if is_first_process():
            as_known = (
                " with its own settings"
                if departures(OmegaConf.to_container(hydra_config.overrides.task), NEUTRAL)
                else ""
            )
            print(f"{config.name}: {config.summary} Takes {config.duration}{as_known}.", flush=True)
        # They take seconds, and the line above, help and typing errors do not need them.
        try:
            import_lightning()
            from launch.study import run_study

            return run_study()
        finally:
            if is_first_process():
                with suppress(OSError):  # a study that could not even begin leaves no folder behind
                    Path(hydra_config.runtime.output_dir).rmdir()


def completed(arguments: Sequence[str]) -> list[str]:
    """The arguments of train.py, and where they ask to go on with a run those that it was started with.

    `ckpt_path` becomes the absolute path of a run's folder or of a checkpoint; `--config-dir` a part of
    `hydra.searchpath`, which is remembered with a run's overrides.

    Raises:
        CommandLineError, FileNotFoundError: there is no such run or folder.
        ValueError: the run is one of another experiment, or sets what only a person may.
    """
    options = get_args_parser().parse_intermixed_args(arguments)
    flags = [argument for argument in arguments if argument not in options.overrides]
    overrides = _with_search_path(options.overrides, options.config_dir)
    TYPED[:] = overrides
    _check_groups(overrides)
    asked = given_value(overrides, "ckpt_path")
    if asked is None or options.help or options.hydra_help:
        return [*flags, *overrides]
    if options.multirun:
        raise CommandLineError(f"ckpt_path={asked}: expected without -m; a sweep's runs are resumed one by one.")
    if not asked:
        raise CommandLineError("ckpt_path=: expected last, a run's folder or a checkpoint in one, found nothing.")
    if asked == "last":
        experiment = given_value(overrides, "experiment")
        if experiment is None:
            return [*flags, *overrides]  # which one is asked where it always is
        path = _newest_run(overrides, experiment)
    else:
        path = Path(str(asked))
    given = [override for override in overrides if override_key(override) != "ckpt_path"]
    whole = merged(run_of(path), given)
    _check_groups(whole, f"{run_of(path) / RUN_FILE}: ")
    _check_hydra(whole, given, run_of(path) / RUN_FILE)
    return [*flags, *whole, f"ckpt_path={quoted(str(path.resolve()))}"]


def _check_hydra(overrides: Sequence[str], given: Sequence[str], where: Path) -> None:
    """Raise a ValueError if what a run was started with changes what Hydra itself calls or sets; only a person may.

    An experiment's file can do so too, and a run's folder says where it lies.
    """
    trusted = ("hydra", "experiment") if given_value(given, SEARCH_PATH) else ("hydra",)
    typed = [override for override in given if re.split(r"[./@]", override_key(override))[0] in trusted]
    try:
        config = _composed(overrides)
    except HydraException:  # Hydra says it where it always does
        return
    found = _hydra_settings(config, overrides)
    check_resolvers({name: part for name, part in config.items() if name != "hydra"}, overrides, str(where), given)
    for name, setting in _hydra_settings(_composed(typed), typed).items():
        if found[name] != setting:
            raise ValueError(
                f"{where}: expected what a run is made of, found an experiment that sets hydra.{name}, which only a "
                "person may; if it is yours, type experiment=NAME and --config-dir again."
            )


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose("train", list(overrides), return_hydra_config=True))


def _hydra_settings(composed: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What Hydra is told, but for what it notes down of the command line."""
    config = copy.deepcopy(composed["hydra"])
    config["job"].pop("override_dirname")
    given = [override for named in config.pop("overrides").values() for override in named]
    added = [override for override in given if override not in overrides]  # by a file: they would pass for typed ones
    return {"overrides": added} | {name: each for name, each in config.items() if name not in ("runtime", "searchpath")}


def _newest_run(overrides: Sequence[str], experiment: str) -> Path:
    where = [o for o in overrides if override_key(o) in (SEARCH_PATH, "experiment", "name", "output_root")]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", where)
        return newest_run(config.output_root, config.name, experiment)


def _check_groups(overrides: Sequence[str], where: str = "") -> None:
    """Raise a CommandLineError where a group is given something else than the name of an option."""
    search_path = given_value(overrides, SEARCH_PATH) or ()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        names = override.value() if isinstance(override.value(), list) else [override.value()]
        named = override.is_delete() or override.is_sweep_override() or all(isinstance(name, str) for name in names)
        paths = [Path(name) for name in names if isinstance(name, str)]
        outside = any(path.is_absolute() or ".." in path.parts for path in paths)  # of the folders of configurations
        if (outside or not named) and is_group(override.key_or_group, search_path):
            raise CommandLineError(
                f"{where}{override.input_line}: expected the name of an option of {override.key_or_group}."
            )


def _with_search_path(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """The overrides, with the whole search path absolute in one of them, the first."""
    entries = given_value(overrides, SEARCH_PATH) or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return list(overrides)  # Hydra says what it expects
    found = [*([config_dir] if config_dir is not None else []), *map(str, entries)]
    files = {entry: entry.removeprefix("file://") for entry in found}
    found = [entry if "://" in path else f"file://{Path(path).resolve()}" for entry, path in files.items()]
    for missing in missing_folders(found):
        raise CommandLineError(f"{SEARCH_PATH}: expected a folder or package of configurations, found no {missing}.")
    others = [override for override in overrides if override_key(override) != SEARCH_PATH]
    return [f"{SEARCH_PATH}=[{','.join(map(quoted, found))}]", *others] if found else others
