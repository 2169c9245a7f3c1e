"""When checkpoints are taken."""

from pathlib import Path
from typing import Any

import lightning as L


class Checkpoint(L.Callback):
    """Keeps the newest checkpoint of a run in `folder/last.ckpt`.

    One is taken every `every` updates, and after every evaluation rather than just before it, so that a resumed run
    never repeats one. A run whose metrics are no longer finite is stopped before it can overwrite the last good state.

    Args:
        folder: where checkpoints are written.
        every: updates between two checkpoints.
    """

    def __init__(self, folder: str, every: int) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every = every

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
        trainer.save_checkpoint(self.path)
