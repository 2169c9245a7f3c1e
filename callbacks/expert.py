"""What training a language model's expert leaves behind: its vector."""

from pathlib import Path

import lightning as L


class ExpertExport(L.Callback):
    """Writes the expert vector of the best validation to a file when training ends, for others to use."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.restore_best()
        if trainer.is_global_zero:
            module.language.expert(trainer.datamodule.family.name).save(self.path)
        trainer.strategy.barrier()  # all processes will read it
