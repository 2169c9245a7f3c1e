"""When a run that goes on may change what is there."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from launch.files import write_text
from launch.runs import RUN_FILE


class Resumption(L.Callback):
    """Has loggers drop what came after a run's checkpoint, once nothing refuses to go on from it.

    Data sets, replay data and environments are not looked at before the first batch is drawn. If one is refused, or
    anything else fails until then, the study remembers what it did before.

    Args:
        study: its folder, whose `run.yaml` is as it was before this resumption.
    """

    def __init__(self, study: Path) -> None:
        self.path = study / RUN_FILE
        self._before = self.path.read_text("utf-8") if self.path.exists() else None
        self._begun = False

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not self._begun:
            trainer.strategy.barrier()  # another process may still refuse
            self._begin(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._begun:  # nothing was left to train
            self._begin(trainer, module)

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begun = True
        for logger in trainer.loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(module.updates)

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        # Who stops a program means to go on with what was asked for.
        if isinstance(exception, Exception) and not self._begun and self._before is not None:
            write_text(self.path, self._before)
