"""Running an experiment: every arm with every seed, each a Lightning run of its own, then one report."""

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from logging import CRITICAL, ERROR, WARNING, getLogger
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from callbacks.resumption import Resumption
from callbacks.run_log import CLOCKS, read_rows
from components.networks.states import words
from components.structure import check_structure
from components.wording import counted
from datamodules.behaviours.trained import POLICY_SUFFIX, policy_weights
from launch.arms import Run, arms_of, replaced, run_configs, runs_of
from launch.checkpoints import LAST, load_checkpoint
from launch.errors import Stopped
from launch.files import read_results, write_json
from launch.finished import check_finished, check_updates, is_finished
from launch.objectives import metrics_meant, objective_known, objective_value
from launch.overrides import SEARCH_PATH, TYPED, check_resolvers, command, given_value, override_key, quoted
from launch.recipes import (
    RUN_FOLDERS,
    check_targets,
    check_writes,
    foreign_packages,
    moved,
    only_checkpoint,
)
from launch.report import REFERENCES, write_report
from launch.resumptions import changes, history, in_words
from launch.runs import (
    LOCK,
    RUN_FILE,
    check_links,
    lasting,
    locked,
    merged,
    read_resumed,
    started_by_others,
    write_overrides,
)
from launch.settings import TOP_LEVEL, check_parts, check_settings, parts_of, searches
from launch.stops import leave_signals, stopping_at_once
from launch.values import check_types, check_values, one_of, whole_keys


def run_study() -> float | None:
    """Train and evaluate every arm with every seed; finished ones are kept, an interrupted one goes on.

    What is run is what Hydra composed, `configs/train.yaml` with an experiment.

    Returns:
        The metric that `objective` names, if it names one.
    """
    quieten()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    # As text: an interpolation among them is resolved for each run.
    hydras, given = (OmegaConf.to_container(part) for part in (hydra.overrides.hydra, hydra.overrides.task))
    given = [*(override for override in hydras if override_key(override) == SEARCH_PATH), *given]
    if rank_zero_only.rank == 0 and (folder / RUN_FILE).exists():  # it may come from anybody
        check_links(folder)
    with locked(folder) if rank_zero_only.rank == 0 else nullcontext():
        try:
            # Where a scheduler starts the same command in the same folder again, it goes on too.
            complete = given_value(given, "ckpt_path") is not None
            with stopping_at_once():
                if complete:
                    return _run_study(folder, given, TYPED)
                return _run_study(folder, merged(folder, given), given)
        finally:
            if rank_zero_only.rank == 0 and not (folder / RUN_FILE).exists():
                (folder / LOCK).unlink()


def _run_study(folder: Path, overrides: list[str], typed: Sequence[str]) -> float | None:
    config = compose("train", overrides)
    foreign = rank_zero_only.rank == 0 and (folder / RUN_FILE).exists()  # it may come from anybody; others follow
    where = str(folder / RUN_FILE)
    if foreign:
        check_resolvers(OmegaConf.to_container(config), overrides, where, typed)
    check_settings(config, overrides)
    runs = list(runs_of(config, folder))
    started_from = _checkpoint_argument(config, runs)
    configs = run_configs(runs, config, overrides)
    named = given_value(typed, "trust") or ()  # an experiment's file may come with the folder
    trust = tuple(named.split(",")) if isinstance(named, str) else tuple(named)
    for run in runs:
        if foreign:
            check_resolvers(OmegaConf.to_container(configs[run]), overrides, where, typed)
        check_parts(configs[run], overrides)
        if foreign:
            called = check_targets(parts_of(configs[run]), where, trust, RUN_FOLDERS, unmarked=True)
            keys = [key for key in map(override_key, typed) if "." in key]  # others choose a file
            check_writes(called, where, folder, keys)
        check_types(configs[run], TOP_LEVEL)
        check_values(configs[run])
    checkpoints = {run: run.checkpoint for run in runs}
    checkpoints |= {run: started_from for run in runs if started_from and run.folder in started_from.parents}
    pending = [run for run in runs if not is_finished(run, configs[run])]
    check_finished(runs, pending, configs)
    for run in pending:
        if checkpoints[run].exists():
            check_updates(run, configs[run], load_checkpoint(checkpoints[run])["learning_method"]["updates"])
    for run in pending:
        begins = configs[run].init_from
        if begins is None or run.checkpoint.exists() or Path(begins).is_relative_to(folder):  # not there yet
            continue
        only_checkpoint(begins, "init_from")  # now, not when those before it are trained
    if config.objective is not None and pending:
        arms = {run.arm: configs[run] for run in runs}
        if not objective_known(config.objective, map(parts_of, arms.values())):
            _say(f"objective={config.objective}: whether it is measured shows when the first run is evaluated.")
    announce(config, overrides, runs, pending)
    try:
        for run in pending:
            with whole_keys(configs[run]):
                *parts, saved = build(run, configs[run], checkpoints[run])
            processes = parts[0].num_devices * parts[0].num_nodes
            if processes > 1 and searches():  # each would make the whole search, with values that it draws itself
                raise ValueError(f"trainer.devices: expected one process in a search, found {processes}.")
            started, starter = started_by_others()
            if 1 < started != processes:  # each would make a run of its own
                raise ValueError(
                    f"trainer.devices: expected the {started} processes that {starter} has started, found {processes}; "
                    f"add trainer=ddp trainer.devices={started}, of several machines those of each."
                )
            parts[0].callbacks.insert(0, Resumption(folder))
            _remember(folder, overrides, run, saved, parts[1].recipe)  # now that they are known to make sense
            if run is pending[0]:
                _say(f"Writing to {folder}")
            with whole_keys(configs[run]):
                train(*parts, folder)
            del parts  # or its data would stay in memory while the next are built
            if searches():  # not only when the other seeds are trained
                done = {each.arm: read_results(each.results)["metrics"] for each in runs if each.results.exists()}
                if done.keys() == arms_of(config).keys():
                    metrics_meant(config.objective, done)
        _finish(config, overrides, configs, folder)
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns Ctrl-C into the latter
        begun = (folder / RUN_FILE).exists()
        packages = _own_packages(configs)
        trusting = [f"trust=[{','.join(sorted(packages))}]"] if packages else []
        again = command("train", [f"ckpt_path={quoted(str(folder))}", *trusting], packages)
        advice = f"Go on with: {again}" if begun else "Nothing was written."
        raise Stopped(f"Stopped. {advice}", stop.code if isinstance(stop, SIGTERMException) else 130) from None
    return None if config.objective is None else objective_value(config.objective, folder, arms_of(config))


def _own_packages(configs: Mapping[Run, DictConfig]) -> set[str]:
    """A person's own, of which something is built in one of the runs."""
    return set().union(*(foreign_packages(parts_of(own)) for own in configs.values()))


def build(
    run: Run, config: DictConfig, checkpoint: Path
) -> tuple[L.Trainer, L.LightningModule, L.LightningDataModule, Path | None, dict[str, Any] | None]:
    """The parts of one arm with one seed, and if there is one its checkpoint and what that says of itself."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = _made(config.datamodule, "datamodule", L.LightningDataModule)
    module = _made(config.module, "module", L.LightningModule, **datamodule.spec)
    module.recipe = {
        "experiment": config.name,
        "study": config.study_dir,
        "spec": dict(datamodule.spec),
        "module": OmegaConf.to_container(config.module, resolve=True),
        "datamodule": OmegaConf.to_container(config.datamodule, resolve=True),
        "trainer": OmegaConf.to_container(config.trainer, resolve=True),
    }
    if checkpoint.is_symlink() and not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: expected a checkpoint, found a link that leads nowhere.")
    resume, saved = checkpoint if checkpoint.exists() else None, None
    for other in [] if resume is not None else run.folder.glob("hpc_ckpt_*"):
        raise ValueError(f"{other}: expected none but {LAST}, found what Lightning would load on SLURM; delete it.")
    if resume is None and run.folder.exists():
        _say(f"{run.arm}, seed {run.seed}: stopped before its first checkpoint, starts over.")
    if resume is None and config.init_from is not None:
        _say(f"{run.arm}, seed {run.seed}: {_begin(module, config)}")
    if resume is not None:
        saved = _check(resume, module, datamodule)
        changed = in_words(changes(saved["recipe"], module.recipe))
        _say(f"{run.arm}, seed {run.seed}: resuming after {counted(saved['updates'], 'update')}{changed}.")
    loggers, callbacks = (
        [_made(part, f"{group}.{name}", kind) for name, part in config[group].items() if part is not None]
        for group, kind in (("logger", Logger), ("callbacks", L.Callback))
    )
    trainer = _made(
        config.trainer, "trainer", L.Trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(run.folder)
    )
    leave_signals(trainer)
    return trainer, module, datamodule, resume, saved


def _made(config: DictConfig, key: str, kind: type, **more: Any) -> Any:
    """What a part of a configuration describes.

    Raises:
        ValueError: it is of another kind.
    """
    made = instantiate(config, **more)
    if not isinstance(made, kind):
        raise ValueError(f"{key}: expected a {kind.__name__}, found {type(made).__name__}.")
    return made


def train(
    trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule, resume: Path | None, study: Path
) -> None:
    """Train and evaluate one arm with one seed; the results, written last, mark it as finished."""
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    _measure_references(datamodule, study)
    trainer.test(module, datamodule=datamodule, verbose=False)
    if hasattr(datamodule, "finish") and trainer.is_global_zero:
        datamodule.finish()


@rank_zero_only
def _measure_references(datamodule: L.LightningDataModule, folder: Path) -> None:
    """Write the scores that the datamodule offers to compare with, once for all runs."""
    if hasattr(datamodule, "references") and not (folder / REFERENCES).exists():
        write_json(folder / REFERENCES, datamodule.references())


def _begin(module: L.LightningModule, config: DictConfig) -> str:
    """Give a new run the weights of another; says which.

    Raises:
        FileNotFoundError, ValueError: `init_from` or `init_parts` names what is not there or does not fit.
    """
    path = only_checkpoint(config.init_from, "init_from")
    of_policy = path.suffix == POLICY_SUFFIX
    saved = {"state_dict": policy_weights(path, module)} if of_policy else load_checkpoint(path, "init_from")
    parts = config.init_parts or (words(saved["state_dict"]) if of_policy else None)
    try:
        found = module.begin_from(saved, parts)
    except ValueError as error:
        where = "" if str(error).startswith("init_parts=") else f"init_from={path}: "
        raise ValueError(f"{where}{error}") from error
    named = "; ".join(f"{what}: {', '.join(names) or 'nothing'}" for what, names in found.items())
    after = "" if of_policy else f" after {counted(saved['learning_method']['updates'], 'update')}"
    return f"no resumption, but a new run that begins with weights of {path}{after} ({named})."


def _check(checkpoint: Path, module: L.LightningModule, datamodule: L.LightningDataModule) -> dict[str, Any]:
    """What a checkpoint says of itself, its files being where they are now; it is checked before anything is written.

    Raises:
        ValueError: module or datamodule can't go on from it; names the file.
    """
    saved = load_checkpoint(checkpoint)
    name = type(datamodule).__qualname__
    if hasattr(datamodule, "state_structure") and (saved["learning_method"]["updates"] or saved.get(name)):
        check_structure(saved.get(name), datamodule.state_structure, f"ckpt_path={checkpoint}: {name}")
    try:
        module.check_checkpoint(saved)
    except ValueError as error:
        raise ValueError(f"ckpt_path={checkpoint}: {error}") from error
    state = saved["learning_method"]
    before = state["recipe"] or module.recipe
    return {**state, "recipe": moved(before, before["study"], module.recipe["study"])}


def quieten() -> None:
    """Silence messages that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        getLogger(name).setLevel(WARNING)
    getLogger("hydra.utils").setLevel(CRITICAL)  # it says at length what an error says in one sentence
    getLogger("torch.utils.cpp_extension").setLevel(ERROR)  # compiling for the CPU, it misses CUDA
    os.environ.setdefault("TENSORDICT_QUIET", "1")
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _say(text: str) -> None:
    rank_zero_only(print)(text, flush=True)


@rank_zero_only
def _remember(
    folder: Path, overrides: list[str], run: Run, saved: Mapping[str, Any] | None, recipe: Mapping[str, Any]
) -> None:
    """Write down what runs are made with, and what a run that goes on after `saved` changes."""
    write_overrides(folder, _kept(overrides), history(read_resumed(folder), run.name, saved, recipe))


def _kept(overrides: list[str]) -> list[str]:
    """Those that make a run what it is."""
    return [override for override in overrides if override_key(override) not in ("ckpt_path", "trust")]


def _checkpoint_argument(config: DictConfig, runs: list[Run]) -> Path | None:
    """The checkpoint file that `ckpt_path` names, if it names one; it is checked before anything starts."""
    if config.ckpt_path is None or Path(config.ckpt_path).is_dir():
        return None
    path = Path(config.ckpt_path).resolve()
    load_checkpoint(path)
    if not any(run.folder in path.parents for run in runs):
        known = one_of([run.name for run in runs], str(path))
        raise ValueError(f"ckpt_path={config.ckpt_path}: expected a checkpoint of {known}, found another.")
    return path


def announce(config: DictConfig, overrides: list[str], runs: list[Run], pending: list[Run]) -> None:
    """One line on how much there is to do, and one on what makes arms less different."""
    arms, seeds = len({run.arm for run in runs}), len({run.seed for run in runs})
    done = (
        f", {len(runs) - len(pending)} of {counted(len(runs), 'run')} done already" if len(pending) < len(runs) else ""
    )
    _say(f"{counted(arms, 'arm')}, {counted(seeds, 'seed')}{done}.")
    for sentence in replaced(config, overrides):
        _say(sentence)


@rank_zero_only
def _finish(config: DictConfig, overrides: list[str], configs: Mapping[Run, DictConfig], folder: Path) -> None:
    kept = lasting(_kept(overrides))
    remarks, resumed, packages = replaced(config, kept), read_resumed(folder), _own_packages(configs)
    write_report(config, kept, list(configs), folder, remarks, resumed, packages)
    print((folder / "report.md").read_text())
    for sentence in _nowhere(config, set(map(override_key, kept)), list(configs)):
        print(sentence)
    print(folder)


def _nowhere(config: DictConfig, typed: Collection[str], runs: Sequence[Run]) -> Iterator[str]:
    """Says which of the metrics that a person wants to see no run has."""
    learned = {name for run in runs if run.log("train").exists() for name in read_rows(run.log("train"))[0]}
    learned -= set(CLOCKS)
    scores = {name for run in runs for name in read_results(run.results)["metrics"]}
    asked = {
        "training_curves": (list(config.training_curves), learned),
        "curves_against": ([config.curves_against], learned | scores),
        "aggregate": ([config.aggregate], scores),
    }
    for key in asked.keys() & typed:
        for name in filter(None, asked[key][0]):
            if not any(fnmatch(metric, name) for metric in asked[key][1]):
                yield f"{key}: no run has measured {name}; expected {one_of(sorted(asked[key][1]), name)}."
