"""When checkpoints are taken."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from components.checks import Count, checked
from components.networks.states import not_finite
from components.wording import counted, size
from launch.checkpoints import LAST


@checked
class Checkpoint(L.Callback):
    """Keeps the newest checkpoint of a run in `folder/last.ckpt`.

    One is taken every `every` updates, and after every evaluation rather than just before it, so that a resumed run
    never repeats one. A run whose metrics or weights are no longer finite is stopped before it can overwrite the last
    good state. What the checkpoints cost is printed when training ends.

    Args:
        folder: where checkpoints are written.
        every: updates between two checkpoints.
        name: of the run, in what is printed.
    """

    def __init__(self, folder: str, every: Count, name: str) -> None:
        self.name = name
        self.path = Path(folder) / LAST
        self.every = every
        self._seconds: list[float] = []
        self._bytes: list[int] = []

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.every % module.updates_per_step:
            raise ValueError(
                f"every={self.every}: expected a multiple of updates_per_step={module.updates_per_step}, found none."
            )
        allowed = getattr(trainer.datamodule, "checkpoint_every", self.every)
        if self.every > allowed:
            raise ValueError(
                f"every={self.every}: expected at most datamodule.checkpoint_every={allowed}, for "
                "which the replay buffer has room."
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before_evaluation = batch_idx + 1 == trainer.num_training_batches
        if module.updates % self.every == 0 and not before_evaluation:
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._save(trainer, module)

    def _save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.training_metrics()  # raises if they are not finite
        saved = module.state_dict()  # without what never changes, such as a pretrained model
        name = not_finite(saved, {name for name, _ in module.named_parameters()})
        if name is not None:
            raise ValueError(
                f"{name} is not finite after {module.updates} updates: expected finite weights; no checkpoint was "
                "taken of them."
            )
        began = time.monotonic()
        trainer.save_checkpoint(self.path)
        if not trainer.is_global_zero:
            return
        self._seconds.append(time.monotonic() - began)
        # Datamodules that keep experience beside the checkpoint say what they had to write.
        self._bytes.append(self.path.stat().st_size + getattr(trainer.datamodule, "saved_bytes", 0))

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._seconds:
            count = len(self._seconds)
            print(
                f"{self.name}: took {counted(count, 'checkpoint')} of {sum(self._seconds) / count:.2f} s and "
                f"{size(sum(self._bytes) / count)}{' each' * (count > 1)}.",
                flush=True,
            )
