"""Where runs live, and how the one to resume is found."""

from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

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
    """The folder of the run that `ckpt_path` means: `last` (of sweeps too), a run's folder, or a checkpoint in one."""
    if ckpt_path == "last":
        root = Path(output_root)
        runs = {(run.parent.name, 0): run for run in (root / name).glob(f"*/{RUN_FILE}")}
        for run in root.glob(f"sweep/*/*/{RUN_FILE}"):
            if f"experiment={name}" in OmegaConf.load(run).overrides:
                runs[run.parent.parent.name, int(run.parent.name)] = run
        if not runs:
            raise FileNotFoundError(f"ckpt_path=last: expected a run of {name} in {root / name}, found none.")
        return runs[max(runs)].parent.resolve()
    path = Path(ckpt_path).resolve()
    if not path.exists():
        raise FileNotFoundError(
            f"ckpt_path={ckpt_path}: expected a run's folder or a checkpoint in one, found nothing."
        )
    for folder in (path, *path.parents):
        if (folder / RUN_FILE).is_file():
            return folder
    raise FileNotFoundError(f"ckpt_path={ckpt_path}: expected a run's folder or a checkpoint in one, found neither.")
