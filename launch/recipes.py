"""Rebuilding a method and its datamodule from what a checkpoint says of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import get_object, instantiate

from launch.checkpoints import LAST, load_checkpoint
from launch.runs import RUN_FILE

# A checkpoint may come from anybody: nothing outside of the project is called on its word. A name alone proves little,
# since Hydra would follow it through a module of the project into whatever that module imports.
TRUSTED = ("callbacks.", "components.", "datamodules.", "lightning_modules.", "torch.optim.")
LOOK_UPS = ("hydra.utils.get_class", "hydra.utils.get_method")


def find_checkpoint(ckpt_path: str, output_root: str) -> Path:
    """The checkpoint file that is meant: a file, the newest in a folder, or for `last` the newest of all runs.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(output_root) if ckpt_path == "last" else Path(ckpt_path)
    if path.is_file():
        return path
    found = find_checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"ckpt_path={ckpt_path}: expected a checkpoint or a folder with one in {path}, found none."
        )
    return found[-1]


def find_checkpoints(folder: Path) -> list[Path]:
    """All below a folder, the oldest first."""
    return sorted(folder.rglob(LAST), key=lambda file: file.stat().st_mtime)


def only_checkpoint(path: str, key: str) -> Path:
    """The checkpoint file that a key of the configuration means: a file, or the only one in a folder.

    Raises:
        FileNotFoundError, ValueError: there is none, or a choice.
    """
    if Path(path).is_file():
        return Path(path)
    found = find_checkpoints(Path(path))
    if not found:
        raise FileNotFoundError(f"{key}={path}: expected a checkpoint or a folder with one, found none.")
    if len(found) > 1:
        raise ValueError(f"{key}={path}: expected one checkpoint, found {len(found)}; name one, such as {found[0]}.")
    return found[0]


def rebuild_method(path: str | Path, trust: tuple[str, ...] = ()) -> tuple[L.LightningModule, dict[str, Any]]:
    """The method with its trained weights, and the recipe of its run; no environment or data set is made.

    Args:
        trust: packages outside of the project whose classes the recipe may call too.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing, damaged, or asks for something foreign.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    recipe = checkpoint["learning_method"]["recipe"]
    if recipe is None:
        raise ValueError(f"ckpt_path={path}: expected a checkpoint written by train.py, found one without a recipe.")
    check_targets(recipe, path, trust)
    study = study_of(path)
    if study is not None:
        recipe = _moved(recipe, recipe.get("study"), str(study))
    module = instantiate(recipe["module"], **recipe["spec"])
    module.load_state_dict(checkpoint["state_dict"])
    module.on_load_checkpoint(checkpoint)
    return module, recipe


def rebuild(path: Path, trust: tuple[str, ...] = ()) -> tuple[L.LightningModule, L.LightningDataModule, dict[str, Any]]:
    """As `rebuild_method`, with the datamodule of the run in the middle."""
    module, recipe = rebuild_method(path, trust)
    return module, instantiate(recipe["datamodule"]), recipe


def study_of(checkpoint: Path) -> Path | None:
    """The folder of the study that a checkpoint lies in, STUDY/ARM/SEED/checkpoints/last.ckpt; None if in none."""
    folder = next(iter(checkpoint.resolve().parents[3:4]), None)
    return folder if folder is not None and (folder / RUN_FILE).exists() else None


def _moved(node: Any, before: str | None, now: str) -> Any:
    """A recipe whose files in the folder that its study had are where that folder is now."""
    if isinstance(node, Mapping):
        return {key: _moved(value, before, now) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_moved(value, before, now) for value in node]
    if before is not None and isinstance(node, str) and node.startswith(f"{before}/"):
        return now + node.removeprefix(before)
    return node


def check_targets(node: Any, path: Path, trust: tuple[str, ...] = ()) -> None:
    """Raise a ValueError if a recipe would call anything outside of the project and of what is trusted."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        called = node.get("path") if target in LOOK_UPS else target
        if target is not None and not _is_below(str(called), (*TRUSTED, *(f"{package}." for package in trust))):
            raise ValueError(
                f"ckpt_path={path}: expected a recipe of this project's classes, found {called}; if it is yours, add "
                f"trust={str(called).split('.')[0]}."
            )
        for value in node.values():
            check_targets(value, path, trust)
    elif isinstance(node, list | tuple):
        for value in node:
            check_targets(value, path, trust)


def _is_below(name: str, packages: tuple[str, ...]) -> bool:
    if not name.startswith(packages):
        return False
    try:
        found = get_object(name)
    except Exception:  # Hydra raises what importing raises
        return False
    return f"{getattr(found, '__module__', '')}.".startswith(packages)
