"""What an evaluated run leaves behind: its scores, and films of it."""

import errno
import os
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from components.checks import Positive, Range, Size, checked
from components.files import replacing
from components.wording import counted
from launch.files import write_json
from launch.plots import COLOURS, STYLE, grid, heading
from launch.provenance import code, package_code, provenance
from launch.recipes import foreign_packages


class Results(L.Callback):
    """Writes the scores of the final evaluation to `folder/results.json`: every metric's values, one for each episode.

    The file marks a run as finished, and says what it was composed of, and with what on which machine.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        code()  # as it is now that the run begins

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for package in foreign_packages(module.recipe):
            package_code(package)

    @rank_zero_only
    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "test" or not module.scores:  # after pictures and films, which others make when the test ends
            return
        results = {"updates": module.updates, "seconds": round(module.elapsed(), 1), "metrics": module.scores}
        gpus = trainer.device_ids if trainer.strategy.root_device.type == "cuda" else []
        made_by = provenance(gpus, foreign_packages(module.recipe))
        write_json(self.folder / "results.json", {**results, "recipe": module.recipe, "provenance": made_by})


class RewardCurves(L.Callback):
    """Draws the reward of every task over its episodes, mean and range, in `folder/rewards.png`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._curves: dict[str, torch.Tensor] = {}

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        for index, reward in enumerate(batch.rewards):
            self._curves[f"{batch.name}/{reward}"] = outputs["reward"][index]

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._curves:
            return
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        rows, columns = grid(len(self._curves), 4)
        with rc_context(STYLE):
            figure = Figure(figsize=(3.2 * columns, 2.2 * rows + 0.4), layout="constrained")
            panels = figure.subplots(rows, columns, squeeze=False, sharey=True)  # or what is nearly nothing fills one
            for axis, (name, reward) in zip(panels.flat, self._curves.items()):
                steps = range(1, reward.shape[1] + 1)
                band = axis.fill_between(
                    steps, reward.min(0).values, reward.max(0).values, color=COLOURS[0], alpha=0.25, linewidth=0
                )
                (line,) = axis.plot(steps, reward.mean(0), color=COLOURS[0])
                axis.set_title(f"{heading(name)}\nreturn {reward.sum(-1).mean():.1f}")
                axis.set_xlabel("step")
            for axis in panels[:, 0]:
                axis.set_ylabel("reward")
            for axis in panels.flat[len(self._curves) :]:
                axis.set_axis_off()
            labels = [f"mean of {counted(len(reward), 'episode')}", "their range"]
            figure.legend([line, band], labels, loc="outside lower center", ncols=2, frameon=False)
            with replacing(self.folder / "rewards.png") as temporary:
                figure.savefig(temporary, dpi=150)


FRAMES_PER_SECOND = 20


@checked
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

    def __init__(
        self, folder: str | Path, seconds: Positive = 10.0, size: Annotated[int, Range(1, 960)] = 320, moments: Size = 8
    ) -> None:
        self.folder = Path(folder)
        self.seconds = seconds
        self.size = size
        self.moments = moments
        self._can_film = True
        self._strips: dict[str, list[Any]] = {}

    @rank_zero_only
    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if not batch.rewards:
            return
        camera = batch.camera(self.size) if self._can_film else None
        self._can_film = camera is not None  # a machine that can't is asked, and reports it, once
        if camera is not None:
            for index, reward in enumerate(batch.rewards):
                self._film(camera, batch.name, reward, outputs["physics"][index])

    def _film(self, camera: Any, protocol: str, reward: str, physics: torch.Tensor) -> None:
        import imageio.v2 as imageio

        stride = max(1, round(camera.steps_per_second / FRAMES_PER_SECOND))
        steps = min(len(physics) - 1, int(self.seconds * camera.steps_per_second))
        frames = [camera(physics[step]) for step in range(0, steps + 1, stride)]
        with replacing(self.folder / f"{protocol}_{reward}.mp4") as temporary:
            imageio.mimwrite(temporary, frames, fps=camera.steps_per_second / stride, ffmpeg_log_level="quiet")
            if b"moov" not in temporary.read_bytes():  # a film's index is written last, and a full disk is not reported
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        moments = torch.linspace(0, len(physics) - 1, self.moments).round().long()
        self._strips[heading(protocol, reward)] = [camera(physics[moment]) for moment in moments]

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
                axis.set(xticks=[], yticks=[])  # framed, for what is drawn may be white
                axis.spines[:].set_color("0.7")
            row[0].set_title(name, loc="left", fontsize=9)
        with replacing(self.folder / "contact_sheet.png") as temporary:
            figure.savefig(temporary, dpi=100)
        self._strips = {}
