"""Writing checkpoints so that a kill at any instant leaves a whole one, and finding them again."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from components.files import replacing

LAST = "last.ckpt"


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
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}={path}: expected a checkpoint file, found none.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many types for many kinds of damage
        raise ValueError(f"{key}={path}: expected a whole checkpoint, found a damaged or foreign file.") from error
    if not isinstance(checkpoint, dict) or "learning_method" not in checkpoint:
        raise ValueError(f"{key}={path}: expected a checkpoint of this project, found another file.")
    return checkpoint
