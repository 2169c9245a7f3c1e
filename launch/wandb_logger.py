"""Weights & Biases, without a question, a warning or a network where the user has no account."""

import netrc
import os
import uuid
from pathlib import Path
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from launch.files import write_text

RUN_ID = "wandb_run_id"


def wandb_logger(project: str, name: str, folder: str | Path) -> WandbLogger:
    """A logger whose files lie in the run's folder; offline unless the user is logged in, one run also when resumed.

    Args:
        project, name: as Weights & Biases shows them.
        folder: of the run. `wandb sync folder/wandb/offline-run-*` uploads what was logged offline.
    """
    if rank_zero_only.rank != 0:
        return WandbLogger(project=project, name=name)  # its methods do nothing in this process
    if wandb.run is not None:  # of the arm before: it would be continued
        wandb.finish()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project,
        name=name,
        dir=folder,
        id=_run_id(folder),
        resume="allow",
        mode=os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline"),
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("updates")
    run.define_metric("*", step_metric="updates")
    return WandbLogger(experiment=run)


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
