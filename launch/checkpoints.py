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
    "optimizer_states": [{"state": {int: dict}, "param_groups": [{"params": [COUNT]}]}],
    "lr_schedulers": list,
    "callbacks": {str: dict},
    "learning_method": {
        "class": str,
        "recipe": (None, RECIPE),
        "updates": COUNT,
        "env_steps": COUNT,
        "seconds": NUMBER,
        "processes": [{"random": dict, "tallies": [list]}, ...],
    },
}
"""What every checkpoint holds; methods and datamodules add to it, and compare what is their own."""

_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
_DEEPEST = 50


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
    checkpoint = _plain(checkpoint, f"{key}={path}", set(), 0)
    checkpoint.setdefault("callbacks", {})
    check_structure(checkpoint, CHECKPOINT, f"{key}={path}")
    # Lightning would go by what else it knows of: its own counters, which are not kept, and who wrote them.
    others = {name: value for name, value in checkpoint.items() if name in CHECKPOINT or isinstance(value, dict)}
    others.pop("loops", None)
    # A callback that is told of files, as Lightning's of checkpoints are, may delete them.
    others["callbacks"] = {name: state for name, state in checkpoint["callbacks"].items() if not _has_text(state)}
    return {**others, "pytorch-lightning_version": L.__version__}


def _plain(node: Any, where: str, memory: set[int], depth: int) -> Any:
    """A copy of what was read, of numbers, texts, lists, dictionaries and tensors, each with memory of its own.

    What was read may be tensors of which several numbers, or several tensors, are one place in memory, or of layouts
    that kernels do not look for: what writes to them in the order of their sizes would write elsewhere.

    Raises:
        ValueError: there is something else; names the place.
    """
    if depth > _DEEPEST:
        raise ValueError(f"{where[:300]}: expected at most {_DEEPEST} levels, found more.")
    if isinstance(node, dict):
        for name in node:
            _check_plain(name, (str, int), f"{where}, a name")
        return {name: _plain(each, f"{where}.{name}", memory, depth + 1) for name, each in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(each, f"{where}[{index}]", memory, depth + 1) for index, each in enumerate(node)]
    if not isinstance(node, Tensor):
        _check_plain(node, (str, int, float, bool, type(None)), where)
        return node
    node = node.detach()
    if node.layout is not torch.strided or node.device.type != "cpu" or node.dtype not in _DTYPES or node.is_neg():
        raise ValueError(f"{where}: expected a tensor of plain numbers in memory, found {node.dtype}, {node.layout}.")
    storage = node.untyped_storage()
    own = node.is_contiguous() and storage.nbytes() == node.nbytes and storage.data_ptr() not in memory
    if not own:
        node = node.clone(memory_format=torch.contiguous_format)
    memory.add(node.untyped_storage().data_ptr())
    return node


def _check_plain(value: Any, kinds: tuple[type, ...], where: str) -> None:
    if type(value) not in kinds:
        raise ValueError(f"{where}: expected a plain value, found {type(value).__name__}.")
    try:
        str(value).encode()
    except ValueError as error:  # half a character; a number of thousands of digits
        raise ValueError(f"{where}: expected a plain value, found one that can't be written.") from error


def _has_text(node: Any) -> bool:
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return isinstance(node, str) or any(map(_has_text, parts))


def _check_archive(path: Path) -> None:
    """Compare the checksums of all that an archive holds, which torch leaves out."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed archive, as torch writes none")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} has another checksum")
