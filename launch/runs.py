"""Where runs live, and how the one to resume is found."""

from datetime import datetime
from pathlib import Path

RUN_FILE = "run.yaml"
"""Marks the folder of a run; holds the overrides it was started with."""


def run_folder(output_root: str, name: str, ckpt_path: str | None) -> str:
    """The folder of the run to start, or of the one to resume.

    Raises:
        FileNotFoundError: `ckpt_path` names no run.
    """
    if ckpt_path is None:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")  # fine enough that no two runs share a folder
        return str(Path(output_root) / name / stamp)
    return str(resumed_folder(output_root, name, ckpt_path))


def resumed_folder(output_root: str, name: str, ckpt_path: str) -> Path:
    """The folder of the run that `ckpt_path` means: `last`, a run's folder, or a checkpoint in one."""
    if ckpt_path == "last":
        runs = sorted((Path(output_root) / name).glob(f"*/{RUN_FILE}"), key=lambda path: path.parent.name)
        if not runs:
            raise FileNotFoundError(
                f"ckpt_path=last: expected a run of {name} in {Path(output_root) / name}, found none."
            )
        return runs[-1].parent.resolve()
    path = Path(ckpt_path).resolve()
    if not path.exists():
        raise FileNotFoundError(
            f"ckpt_path={ckpt_path}: expected a run's folder or a checkpoint in one, found nothing."
        )
    for folder in (path, *path.parents):
        if (folder / RUN_FILE).is_file():
            return folder
    raise FileNotFoundError(f"ckpt_path={ckpt_path}: expected a run's folder or a checkpoint in one, found neither.")
