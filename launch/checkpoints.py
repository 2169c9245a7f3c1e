"""Writing checkpoints so that a kill at any instant leaves a whole one, and finding them again."""

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from components.files import check_file, is_damage, naming, replacing
from components.structure import COUNT, NUMBER, check_structure
from launch.files import RECIPE

LAST = "last.ckpt"
CHECKPOINT = {
    "state_dict": {str: Tensor},
    "optimizer_states": [
        {"state": {int: dict}, "param_groups": [{"params": [COUNT]}]}
    ],  # the rest is compared with the optimisers
    "lr_schedulers": list,
    "callbacks": {str: dict},
    "learning_method": {
        "class": str,
        "recipe": (None, RECIPE),
        "updates": COUNT,
        "env_steps": COUNT,
        "seconds": NUMBER,
        "processes": [{"random": dict, "tallies": [list]}],
    },
}
"""What every checkpoint holds; methods and datamodules add to it, and compare what is their own."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves beside the destination and renames; loads tensors and plain types only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(path) as temporary, open(temporary, "wb") as file:  # of a file by name, torch knows no reason
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(path)


def load_checkpoint(path: str | Path, key: str = "ckpt_path") -> dict[str, Any]:
    """Read a checkpoint on the CPU.

    Args:
        key: of the configuration, which names the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a whole checkpoint.
    """
    path = Path(path)
    check_file(path, "a checkpoint file", key)
    try:
        with naming(path):
            _check_archive(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for many kinds of damage
        if not is_damage(error):
            raise
        raise ValueError(f"{key}={path}: expected a whole checkpoint, found a damaged or foreign file.") from error
    if not isinstance(checkpoint, dict) or "learning_method" not in checkpoint:
        raise ValueError(f"{key}={path}: expected a checkpoint of this project, found another file.")
    checkpoint.setdefault("callbacks", {})
    check_structure(checkpoint, CHECKPOINT, f"{key}={path}")
    # Lightning would go by what else it knows of: its own counters, which are not kept, and who wrote them.
    others = {name: value for name, value in checkpoint.items() if name in CHECKPOINT or isinstance(value, dict)}
    others.pop("loops", None)
    return {**others, "pytorch-lightning_version": L.__version__}


def _check_archive(path: Path) -> None:
    """Compare the checksums of all that an archive holds, which torch leaves out."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed archive, as torch writes none")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} has another checksum")
