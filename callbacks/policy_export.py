"""Policies of a run at moments of it, as weights that other programs load."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file

from components.checks import Count, Seed, checked
from components.files import locking, read_json, replacing
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
    """

    def __init__(self, folder: str | Path, name: str, stages: Mapping[str, Count], seed: Seed) -> None:
        self.folder = Path(folder)
        self.name = name
        self.stages = {updates: stage for stage, updates in stages.items()}
        self.seed = seed

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        every = trainer.datamodule.evaluate_every
        for updates, stage in self.stages.items():
            if updates % every and updates != module.total_updates:
                raise ValueError(
                    f"callbacks.policy_export.stages.{stage}={updates}: expected a multiple of "
                    f"datamodule.evaluate_every={every}, found none."
                )

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or module.updates not in self.stages:
            return
        name = f"{self.name}_{self.stages[module.updates]}"
        weights = module.policy(exploring=True).module.state_dict()
        with replacing(self.folder / f"{name}.safetensors") as temporary:
            save_file({key: each.detach().cpu().contiguous() for key, each in weights.items()}, temporary)
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
