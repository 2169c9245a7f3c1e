"""Running an experiment: every arm with every seed, each a Lightning run of its own, then one report."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from logging import WARNING, getLogger
from pathlib import Path

import lightning as L
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from launch.checkpoints import LAST, load_checkpoint
from launch.report import write_report
from launch.runs import RUN_FILE

NOT_REMEMBERED = ("ckpt_path=", "experiment=")


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
    overrides = _overrides(folder, list(HydraConfig.get().overrides.task))
    config = compose("train", overrides)
    runs = list(_runs(config, folder))
    pending = [run for run in runs if not run.results.exists()]
    started_from = _checkpoint_argument(config, runs)
    announce(config, runs, pending, folder)
    for run in pending:
        execute(run, overrides, started_from if started_from and run.folder in started_from.parents else run.checkpoint)
    _finish(config, runs, folder)


def execute(run: Run, overrides: list[str], checkpoint: Path) -> None:
    """Train and evaluate one arm with one seed, from its checkpoint if there is one."""
    config = run_config(run, overrides)
    L.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = instantiate(config.datamodule)
    module = instantiate(config.module, **datamodule.spec)
    module.recipe = {
        "experiment": config.name,
        "spec": dict(datamodule.spec),
        "module": OmegaConf.to_container(config.module, resolve=True),
        "datamodule": OmegaConf.to_container(config.datamodule, resolve=True),
    }
    loggers = [instantiate(logger) for logger in config.logger.values()]
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(run.folder))
    resume = None
    if checkpoint.exists():
        resume = str(checkpoint)
        updates = load_checkpoint(checkpoint).get("learning_method", {}).get("updates", 0)
        _say(f"{run.arm}, seed {run.seed}: resuming after {updates} updates.")
        for logger in loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(updates)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    trainer.test(module, datamodule=datamodule, verbose=False)


def run_config(run: Run, overrides: list[str]) -> DictConfig:
    """The configuration of one arm with one seed: the experiment's, then the user's overrides, then the arm's."""
    arms = compose("train", overrides).arms
    config = compose("train", [*overrides, *(arms[run.arm] if arms else []), f"seed={run.seed}"])
    config.run_dir = str(run.folder)
    config.arm = run.arm
    return config


def quieten() -> None:
    """Silence messages that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        getLogger(name).setLevel(WARNING)
    os.environ.setdefault("TENSORDICT_QUIET", "1")
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _say(text: str) -> None:
    rank_zero_only(print)(text, flush=True)


def _overrides(folder: Path, given: list[str]) -> list[str]:
    """The overrides of the run: what it was started with, then what it is resumed with."""
    path = folder / RUN_FILE
    remembered: list[str] = []
    if path.exists():
        remembered = list(OmegaConf.load(path).overrides)
        given = [override for override in given if not override.startswith("experiment=")]
    overrides = [*remembered, *given]
    if rank_zero_only.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [override for override in overrides if not override.startswith("ckpt_path=")]
        OmegaConf.save({"overrides": kept}, path)
    return overrides


def _runs(config: DictConfig, folder: Path) -> Iterator[Run]:
    for seed in range(config.seed, config.seed + config.num_seeds):
        for arm in config.arms or {config.name: []}:
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


def announce(config: DictConfig, runs: list[Run], pending: list[Run], folder: Path) -> None:
    """One line on what is about to happen and how long it should take."""
    arms, seeds = len({run.arm for run in runs}), len({run.seed for run in runs})
    done = f", {len(runs) - len(pending)} of {len(runs)} runs done already" if len(pending) < len(runs) else ""
    _say(
        f"{config.name}: {config.summary} {arms} arm{'s' * (arms > 1)}, {seeds} seed{'s' * (seeds > 1)}{done}; "
        f"{config.duration}. Writing to {folder}"
    )


@rank_zero_only
def _finish(config: DictConfig, runs: list[Run], folder: Path) -> None:
    write_report(config, runs, folder)
    print((folder / "report.md").read_text())
    print(folder)
