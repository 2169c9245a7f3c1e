"""Weights & Biases, without a question, a warning or a network where the user has no account."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger

from launch.files import write_text

RUN_ID = "wandb_run_id"


def wandb_logger(project: str, name: str, folder: str | Path) -> WandbLogger:
    """A logger whose files lie in the run's folder; offline unless the user is logged in, one run also when resumed.

    Args:
        project, name: as Weights & Biases shows them.
        folder: of the run. `wandb sync folder/wandb/offline-run-*` uploads what was logged offline.
    """
    if wandb.run is not None:  # of the arm before: it would be continued
        wandb.finish(quiet=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        project=project,
        name=name,
        id=_run_id(folder),
        save_dir=folder,
        offline=not logged_in(),
        settings=wandb.Settings(silent=True, console="off"),
    )


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
        write_text(path, wandb.util.generate_id())
    return path.read_text()
