"""Policies of a run at moments of it, as weights that other programs load."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from components.checks import Count, Seed, checked
from components.files import locking, read_json, replacing
from datamodules.behaviours.trained import save_policy
from launch.files import write_json
from launch.provenance import provenance


@checked
class PolicyExport(L.Callback):
    """Writes `folder/NAME_STAGE.safetensors` at each stage, and what it is of into `folder/manifest.json`.

    The weights are those that `policy(exploring=True)` has; the manifest says the command, seed, updates and
    environment steps that made them, the mean scores of the evaluation at that moment, and with what on which machine.

    Args:
        folder: runs with other names may write there too.
        name: of the policy, such as that of its task.
        stages: name of a moment -> updates, at an evaluation.
        seed: of the run.
        told: what is written into the files besides, for whoever uses the policies: what they observe, for one.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        stages: Mapping[str, Count],
        seed: Seed,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.name = name
        self.stages = dict(stages)
        self.seed = seed
        self.told = told

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        every, last = trainer.datamodule.evaluate_every, module.total_updates
        for stage, updates in self.stages.items():
            if updates > last or (updates % every and updates != last):
                raise ValueError(
                    f"callbacks.policy_export.stages.{stage}={updates}: expected a multiple of "
                    f"datamodule.evaluate_every={every} up to module.updates={last}, found none."
                )
        with TemporaryDirectory() as folder:  # refuses what could not be loaded, before anything is trained
            save_policy(module.policy(exploring=True).module, Path(folder) / "policy.safetensors", self.told)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for stage, updates in self.stages.items():
            if updates == module.updates and not trainer.sanity_checking:
                self._export(module, f"{self.name}_{stage}")

    def _export(self, module: L.LightningModule, name: str) -> None:
        with replacing(self.folder / f"{name}.safetensors") as temporary:
            save_policy(module.policy(exploring=True).module, temporary, self.told)
        made = {
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "seed": self.seed,
            "updates": module.updates,
            "env_steps": module.env_steps,
            "scores": {metric: sum(values) / len(values) for metric, values in module.scores.items()},
            **provenance(),
        }
        path = self.folder / "manifest.json"
        with locking(self.folder / ".manifest.lock", lambda: None):
            known = read_json(path, {str: dict}) if path.exists() else {}
            write_json(path, dict(sorted({**known, name: made}.items())))
