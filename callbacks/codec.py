"""What the training of an image codec leaves behind: its weights, and pictures of what it makes of images."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from components.checks import Size, checked
from components.files import replacing


class CodecExport(L.Callback):
    """Writes the weights of `module.codec` to a file when training ends, for others to store images by."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            module.codec.save(self.path)
        trainer.strategy.barrier()  # all processes will read it


@checked
class Reconstructions(L.Callback):
    """Draws images above what the codec makes of them, a pair of rows for each evaluation task.

    Args:
        folder: `reconstructions.png` is written there.
        images: of each task.
    """

    def __init__(self, folder: str | Path, images: Size = 16) -> None:
        self.folder = Path(folder)
        self.images = images
        self._rows: dict[str, list[torch.Tensor]] = {}

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        step = max(1, len(batch.images) // self.images)
        chosen = slice(0, step * self.images, step)  # of all classes
        self._rows[batch.name] = [batch.images[chosen], outputs["reconstruction"][chosen]]

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        from matplotlib.figure import Figure

        columns = max(len(rows[0]) for rows in self._rows.values())
        figure = Figure(figsize=(0.7 * columns, 1.55 * len(self._rows)), layout="constrained")
        for part, (name, rows) in zip(figure.subfigures(len(self._rows), squeeze=False)[:, 0], self._rows.items()):
            part.suptitle(f"{name} classes, and what is left of them", x=0.01, ha="left", fontsize=8)
            axes = part.subplots(2, columns, squeeze=False)
            for axis in axes.flat:
                axis.set_axis_off()
            for own_axes, images in zip(axes, rows):
                for axis, image in zip(own_axes, images):
                    pixels = image.permute(1, 2, 0).numpy()
                    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
        with replacing(self.folder / "reconstructions.png") as temporary:
            figure.savefig(temporary, dpi=110)
        self._rows = {}
