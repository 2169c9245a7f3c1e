"""Weights & Biases, without a question, a warning or a network where the user has no account."""

import netrc
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run_log import recorded
from launch.files import write_text

RUN_ID = "wandb_run_id"


class Wandb(WandbLogger):
    """A logger whose files lie in the run's folder; offline unless the user is logged in, one run also when resumed.

    Rows are numbered, and W&B takes each number once. A run that is resumed gives W&B all rows up to its checkpoint
    again, from the CSV files: what a server has is left out, what a kill took on its way is made good. Offline, W&B
    knows of no former session and would upload both; the new one holds everything, and takes the former one's place.

    Args:
        project, name: as Weights & Biases shows them.
        folder: of the run. `wandb sync folder/wandb/offline-run-*` uploads what was logged offline.
    """

    def __init__(self, project: str, name: str, folder: str | Path) -> None:
        super().__init__(project=project, name=name, save_dir=folder)
        self.folder = Path(folder)
        self._rows = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The session, which begins when it is first asked for."""
        if self._experiment is None:
            if wandb.run is not None:  # of the arm before: it would be continued
                wandb.finish()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._experiment = wandb.init(
                project=self._project,
                name=self._name,
                dir=self.folder,
                id=_run_id(self.folder),
                resume="allow",
                mode=os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline"),
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._experiment.define_metric("updates")
            self._experiment.define_metric("*", step_metric="updates")
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._rows >= self.experiment.starting_step:
            self.experiment.log(dict(metrics), step=self._rows, commit=True)
        self._rows += 1

    @rank_zero_only
    def rewind(self, updates: int) -> None:
        """Have what W&B shows of the run end with the given number of updates."""
        own = Path(self.experiment.dir).parent
        for row in recorded(self.folder, updates):
            self.log_metrics(row)
        for session in (self.folder / "wandb").resolve().glob("offline-run-*"):
            if own.parent == session.parent and own != session:  # with WANDB_MODE=disabled it is elsewhere
                shutil.rmtree(session)


def logged_in() -> bool:
    """Whether there is an API key in the environment or, as `wandb login` leaves it, in netrc; asks no server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:8])
    return path.read_text()
