"""What an evaluated run leaves behind: its scores, and films of it."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from launch.files import write_json


class Results(L.Callback):
    """Writes the final evaluation to `folder/results.json`: every metric's values, one for each episode.

    The file marks a run as finished. Reference scores that the datamodule knows (a random policy, the best episode of
    its data) are measured beside the first run that is given `references=True`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._metrics: dict[str, list[float]] = {}

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._metrics = {}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._metrics.update(batch.metrics(outputs))

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._metrics:
            return
        results = {"updates": module.updates, "seconds": round(module.elapsed(), 1), "metrics": self._metrics}
        write_json(self.folder / "results.json", results)


class Films(L.Callback):
    """Films the first episode of every reward, and shows moments of all of them on one contact sheet.

    Writes `folder/PROTOCOL_REWARD.mp4` and `folder/contact_sheet.png`. Without a working GL library the films are left
    out with one line.

    Args:
        folder: where films are written.
        seconds: length of the filmed part of an episode, in simulated time.
        size: width and height in pixels.
        moments: pictures of each episode on the contact sheet.
    """

    def __init__(self, folder: str, seconds: float = 10.0, size: int = 320, moments: int = 8) -> None:
        self.folder = Path(folder)
        self.seconds = seconds
        self.size = size
        self.moments = moments
        self._strips: dict[str, list[Any]] = {}

    @rank_zero_only
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if "physics" not in outputs.keys():
            return
        renderer = batch.renderer(self.size)
        if renderer is None:
            return
        with renderer:
            for index, reward in enumerate(batch.rewards):
                self._film(renderer, f"{batch.name}_{reward}", outputs["physics"][index])

    def _film(self, renderer: Any, name: str, physics: torch.Tensor) -> None:
        import imageio.v2 as imageio

        self.folder.mkdir(parents=True, exist_ok=True)
        stride = max(1, round(renderer.steps_per_second / 20))
        steps = min(len(physics) - 1, int(self.seconds * renderer.steps_per_second))
        shown = range(0, steps + 1, stride)
        frames = {step: renderer.frame(physics[step]) for step in shown}
        rate = renderer.steps_per_second / stride
        imageio.mimwrite(self.folder / f"{name}.mp4", list(frames.values()), fps=rate, macro_block_size=16)
        times = torch.linspace(0, len(physics) - 1, self.moments).round().long().tolist()
        self._strips[name] = [frames[t] if t in frames else renderer.frame(physics[t]) for t in times]

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._strips:
            return
        from matplotlib.figure import Figure

        rows = len(self._strips)
        figure = Figure(figsize=(1.6 * self.moments, 1.75 * rows), layout="constrained")
        axes = figure.subplots(rows, self.moments, squeeze=False)
        for row, (name, frames) in zip(axes, self._strips.items()):
            for axis, frame in zip(row, frames):
                axis.imshow(frame)
                axis.set_axis_off()
            row[0].set_title(name, loc="left", fontsize=9)
        figure.savefig(self.folder / "contact_sheet.png", dpi=100)
        self._strips = {}
