"""The progress bar: one line for the whole run, with the numbers that matter."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from components.checks import Positive, checked


@checked
class Progress(L.Callback):
    """A bar over the updates of a run; off a terminal, a line every `line_seconds`."""

    def __init__(self, name: str, line_seconds: Positive = 30.0) -> None:
        self.name = name
        self.line_seconds = line_seconds
        self._bar: Any = None
        self._line_time = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._bar = tqdm(
            desc=self.name,
            total=module.total_updates,
            initial=module.updates,
            unit="update",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._line_time = time.monotonic()
        self._first = (module.updates, module.env_steps, time.monotonic())

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._bar.update(module.updates_per_step)
        if module.updates % module.log_every:
            return
        shown = {name: f"{float(value):.3g}" for name, value in trainer.progress_bar_metrics.items()}
        now = time.monotonic()
        updates, env_steps, started = self._first
        collected = ""
        if module.env_steps:  # experience is collected along the way
            per_second = (module.env_steps - env_steps) / (now - started)
            collected = f", {module.env_steps} env steps, {per_second:.0f}/s"
            shown = {"env_steps": f"{module.env_steps} ({per_second:.0f}/s)", **shown}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable and now - self._line_time >= self.line_seconds:
            self._line_time = now
            speed = (module.updates - updates) / (now - started)
            numbers = "".join(f", {name} {value}" for name, value in shown.items() if name != "env_steps")
            print(
                f"{self.name}: {module.updates}/{module.total_updates} updates, {speed:.1f}/s{collected}, "
                f"{(module.total_updates - module.updates) / speed:.0f} s left{numbers}",
                flush=True,
            )

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._bar.close()

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()
