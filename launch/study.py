"""Running an experiment: every arm with every seed, each a Lightning run of its own, then one report."""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from logging import CRITICAL, ERROR, WARNING, getLogger
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, ListConfig, OmegaConf

from components.checks import check_counts
from launch.checkpoints import LAST, load_checkpoint
from launch.errors import CommandLineError, Stopped
from launch.files import write_json, write_text
from launch.recipes import only_checkpoint
from launch.report import REFERENCES, write_report
from launch.runs import RUN_FILE
from launch.values import check_values


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / LAST


def run_study(config: DictConfig) -> None:
    """Train and evaluate every arm with every seed; finished ones are kept, an interrupted one goes on.

    Args:
        config: the composed configuration, `configs/train.yaml` with an experiment.
    """
    quieten()
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        _run_study(folder, _overrides(folder, list(HydraConfig.get().overrides.task)))
    finally:
        with suppress(OSError):  # a study that could not even begin leaves no folder behind
            folder.rmdir()


def _run_study(folder: Path, overrides: list[str]) -> None:
    config = compose("train", overrides)
    if config.ckpt_path is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CommandLineError(
            f"ckpt_path={config.ckpt_path}: expected without -m; a sweep's runs are resumed one by one, by folder."
        )
    check_counts(num_seeds=config.num_seeds)
    if not isinstance(config.init_parts, ListConfig | None) or (config.init_parts and config.init_from is None):
        raise CommandLineError(f"init_parts={config.init_parts}: expected a list such as [encoder], with init_from.")
    runs = list(_runs(config, folder))
    started_from = _checkpoint_argument(config, runs)
    configs = {run: run_config(run, overrides) for run in runs}
    for run in runs:
        check_values(configs[run])
    pending = [run for run in runs if not _finished(run, configs[run])]
    _check_finished(runs, pending, configs)
    announce(config, overrides, runs, pending, folder)
    try:
        for run in pending:
            own = started_from is not None and run.folder in started_from.parents
            parts = build(run, configs[run], started_from if own else run.checkpoint)
            _remember(folder, overrides)  # now that they are known to make sense
            train(*parts, folder)
            del parts  # or its data would stay in memory while the next are built
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns Ctrl-C into the latter
        message = f"Stopped. Go on with: python train.py experiment={config.name} ckpt_path={folder}"
        raise Stopped(message, 143 if isinstance(stop, SIGTERMException) else 130) from None
    _finish(config, overrides, runs, folder)


def build(
    run: Run, config: DictConfig, checkpoint: Path
) -> tuple[L.Trainer, L.LightningModule, L.LightningDataModule, Path | None]:
    """The parts of one arm with one seed, and its checkpoint if there is one."""
    if config.threads is not None:
        check_counts(threads=config.threads)
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = instantiate(config.datamodule)
    module = instantiate(config.module, **datamodule.spec)
    module.recipe = {
        "experiment": config.name,
        "study": config.study_dir,
        "spec": dict(datamodule.spec),
        "module": OmegaConf.to_container(config.module, resolve=True),
        "datamodule": OmegaConf.to_container(config.datamodule, resolve=True),
    }
    resume = checkpoint if checkpoint.exists() else None
    if resume is None and run.folder.exists():
        _say(f"{run.arm}, seed {run.seed}: stopped before its first checkpoint, starts over.")
    if resume is None and config.init_from is not None:
        _say(f"{run.arm}, seed {run.seed}: {_begin(module, config)}")
    if resume is not None:
        saved = _check(resume, module)
        _say(f"{run.arm}, seed {run.seed}: resuming after {saved['updates']} updates{_changes(saved, module.recipe)}.")
    loggers = [instantiate(logger) for logger in config.logger.values()]
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(run.folder))
    return trainer, module, datamodule, resume


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
    path = only_checkpoint(str(config.init_from), "init_from")
    saved = load_checkpoint(path, "init_from")
    parts = None if config.init_parts is None else [str(part) for part in config.init_parts]
    try:
        found = module.begin_from(saved, parts)
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}") from error
    named = "; ".join(f"{what}: {', '.join(names) or 'nothing'}" for what, names in found.items())
    updates = saved["learning_method"]["updates"]
    return f"no resumption, but a new run that begins with weights of {path} after {updates} updates ({named})."


def _check(checkpoint: Path, module: L.LightningModule) -> dict[str, Any]:
    """What a checkpoint says of itself; it is checked before anything is written.

    Raises:
        ValueError: the module can't go on from it; names the file.
    """
    saved = load_checkpoint(checkpoint)
    try:
        module.check_checkpoint(saved)
    except ValueError as error:
        raise ValueError(f"ckpt_path={checkpoint}: {error}") from error
    return saved["learning_method"]


def _changes(saved: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """What a run goes on with that it did not begin with, but for its length."""
    before, now = (
        dict(_leaves({part: each[part] for part in ("module", "datamodule")})) for each in (saved["recipe"], recipe)
    )
    changed = [
        f"{key}={now.get(key)} (was {before.get(key)})"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and key != "module.updates"
    ]
    return f", with {', '.join(changed)}" if changed else ""


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def run_config(run: Run, overrides: list[str]) -> DictConfig:
    """The configuration of one arm with one seed: the experiment's, then the arm's overrides, then the user's."""
    arms = _arms(compose("train", overrides))
    try:
        config = compose("train", [*arms[run.arm], *overrides, f"seed={run.seed}"])
    except ConfigCompositionException as error:
        unknown = re.search(r"Could not override '([^']+)'", str(error))
        if unknown is None or len(arms) == 1:
            raise
        raise CommandLineError(
            f"{unknown[1]}: what is typed holds for all arms, and the arm {run.arm} has no such key; leave it out with "
            f"arms.{run.arm}=null, or give it to one arm, as in '+arms.mine=[\"{unknown[1]}=VALUE\"]'."
        ) from error
    config.run_dir = str(run.folder)
    config.study_dir = str(run.folder.parents[1])
    config.arm = run.arm
    return config


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


def _overrides(folder: Path, given: list[str]) -> list[str]:
    """The overrides of the run: what it was started with, then what it is resumed with."""
    path = folder / RUN_FILE
    remembered: list[str] = list(OmegaConf.load(path).overrides) if path.exists() else []
    began, asked = ([o for o in part if _key(o) == "experiment"][-1:] for part in (remembered, given))
    if began and asked and began != asked:
        raise ValueError(f"ckpt_path: expected a run of {asked[0]}, found one of {began[0]} in {folder}.")
    # The same override given again replaces its former value: a deletion or an addition can't be made twice.
    keys = {_key(override) for override in given}
    kept = [override for override in remembered if _key(override) not in keys]
    # What had to be added then may have a place of its own by now.
    return [*(f"+{override}" if re.match(r"\+[^+]", override) else override for override in kept), *given]


@rank_zero_only
def _remember(folder: Path, overrides: list[str]) -> None:
    write_text(folder / RUN_FILE, OmegaConf.to_yaml(OmegaConf.create({"overrides": _kept(overrides)})))


def _kept(overrides: list[str]) -> list[str]:
    """Those that make a run what it is."""
    return [override for override in overrides if _key(override) != "ckpt_path"]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _finished(run: Run, config: DictConfig) -> bool:
    """Whether the run has its results, and they are of as many updates as are asked for now."""
    return run.results.exists() and json.loads(run.results.read_text())["updates"] >= config.module.updates


def _check_finished(runs: list[Run], pending: list[Run], configs: Mapping[Run, DictConfig]) -> None:
    """Raise a ValueError if results that would be kept were made in another way than is asked for now."""
    exceeded = {run: f"{run.folder}{os.sep}" for run in pending if run.results.exists()}
    for run in runs:
        if run in pending:
            continue
        advice = f"start anew without ckpt_path, or delete {run.results}"
        saved = json.loads(run.results.read_text()).get("recipe") or {}
        now = OmegaConf.to_container(configs[run], resolve=True)
        before, asked = (
            dict(_leaves({part: each.get(part) for part in ("module", "datamodule")})) for each in (saved, now)
        )
        for key in before.keys() & asked.keys() - {"module.updates"}:
            moved = str(run.folder.parents[1]) in str(asked[key])  # a path in the study's own folder
            if before[key] != asked[key] and not moved:
                raise ValueError(
                    f"{run.arm}, seed {run.seed} is finished: expected {key}={before[key]}, with which it was run, "
                    f"found {asked[key]}; {advice}."
                )
        for other, folder in exceeded.items():
            if any(folder in str(value) for value in asked.values()):
                raise ValueError(
                    f"{other.arm}, seed {other.seed} would go on beyond what {run.arm} was made with: {advice}."
                )


def _arms(config: DictConfig) -> dict[str, list[str]]:
    """Every arm's overrides, without arms that are null; without any, the experiment itself is the only one."""
    if not isinstance(config.arms, DictConfig | None):
        raise CommandLineError(f"arms={config.arms}: expected null, or arms with lists of overrides by their names.")
    arms = {name: list(overrides) for name, overrides in (config.arms or {}).items() if overrides is not None}
    return arms or {config.name: []}


def _runs(config: DictConfig, folder: Path) -> Iterator[Run]:
    for seed in range(config.seed, config.seed + config.num_seeds):
        for arm in _arms(config):
            yield Run(arm, seed, folder / arm / f"seed_{seed}")


def _checkpoint_argument(config: DictConfig, runs: list[Run]) -> Path | None:
    """The checkpoint file that `ckpt_path` names, if it names one; it is checked before anything starts."""
    if config.ckpt_path in (None, "last") or Path(config.ckpt_path).is_dir():
        return None
    path = Path(config.ckpt_path).resolve()
    load_checkpoint(path)
    if not any(run.folder in path.parents for run in runs):
        known = ", ".join(f"{run.arm}/seed_{run.seed}" for run in runs)
        raise ValueError(f"ckpt_path={config.ckpt_path}: expected a checkpoint of one of {known}, found another.")
    return path


def announce(config: DictConfig, overrides: list[str], runs: list[Run], pending: list[Run], folder: Path) -> None:
    """One line on what is about to happen and how long it should take, and one on what makes arms less different."""
    arms, seeds = len({run.arm for run in runs}), len({run.seed for run in runs})
    done = f", {len(runs) - len(pending)} of {len(runs)} runs done already" if len(pending) < len(runs) else ""
    _say(
        f"{config.name}: {config.summary} {arms} arm{'s' * (arms > 1)}, {seeds} seed{'s' * (seeds > 1)}{done}; "
        f"{config.duration}. Writing to {folder}"
    )
    for sentence in _replaced(config, overrides):
        _say(sentence)


def _replaced(config: DictConfig, overrides: list[str]) -> list[str]:
    """Says which arms are not what they were called for."""
    sentences = []
    for key, override in {_key(override): override for override in overrides}.items():
        replaced = [arm for arm, own in _arms(config).items() if any(_key(o) == key and o != override for o in own)]
        if replaced:
            sentences.append(f"{override} holds for all arms, also for {', '.join(replaced)}, which had their own.")
    return sentences


@rank_zero_only
def _finish(config: DictConfig, overrides: list[str], runs: list[Run], folder: Path) -> None:
    kept = _kept(overrides)
    config.notes = [*config.notes, *_replaced(config, kept)]
    write_report(config, kept, runs, folder)
    print((folder / "report.md").read_text())
    print(folder)
