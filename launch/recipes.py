"""Rebuilding a method and its datamodule from what a checkpoint says of them."""

import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import Strategy
from omegaconf import OmegaConf
from torch import nn
from torchrl.envs import EnvBase

from components.buildable import MARK
from launch.checkpoints import LAST, load_checkpoint
from launch.runs import RUN_FILE
from launch.values import check_calling, check_values

# A checkpoint may come from anybody. On its word are called classes of these kinds and what is marked `buildable`, from
# these folders of the project: no other functions, no methods, nothing private. A name alone proves little, since Hydra
# would follow it through a module of the project into whatever that module imports.
KINDS = (nn.Module, L.LightningDataModule, EnvBase, gymnasium.Env, torch.optim.Optimizer)
FOLDERS = ("components", "datamodules", "lightning_modules", "torch.optim")
# The same holds for what a run's folder says that it was started with, which has more parts.
RUN_KINDS = (*KINDS, L.Callback, L.Trainer, Logger, Strategy, CheckpointIO)
# Lightning's own callbacks and loggers write and delete by rules of their own: they have to be trusted.
RUN_FOLDERS = (*FOLDERS, "callbacks", "launch", "lightning.Trainer")
# What a run writes to, of these: a datamodule says it in `writes`.
WRITERS = (L.Callback, L.Trainer, Logger, Strategy, CheckpointIO)
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


def rebuild_method(
    path: str | Path, trust: str | Sequence[str] = (), data_root: str = "data"
) -> tuple[L.LightningModule, dict[str, Any]]:
    """The method with its trained weights, and the recipe of its run; no environment or data set is made.

    Args:
        trust: packages outside of the project whose classes the recipe may call too.
        data_root: the folder, besides that of its study, that what the recipe makes may write to.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing, damaged, or asks for something foreign.
    """
    return _rebuild(Path(path), trust, data_root, ("module",))


def rebuild(
    path: str | Path, trust: str | Sequence[str] = (), data_root: str = "data"
) -> tuple[L.LightningModule, L.LightningDataModule, dict[str, Any]]:
    """As `rebuild_method`, with the datamodule of the run in the middle.

    Args:
        data_root: where data sets may be written that are not there yet.
    """
    module, recipe = _rebuild(Path(path), trust, data_root, ("module", "datamodule"))
    return module, _built(recipe["datamodule"], Path(path), L.LightningDataModule), recipe


def _rebuild(
    path: Path, trust: str | Sequence[str], data_root: str, parts: tuple[str, ...]
) -> tuple[L.LightningModule, dict[str, Any]]:
    """The method, once all of the parts that will be built were checked."""
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    checkpoint = load_checkpoint(path)
    recipe = checkpoint["learning_method"]["recipe"]
    if recipe is None:
        raise ValueError(f"ckpt_path={path}: expected a checkpoint written by train.py, found one without a recipe.")
    study = study_of(path)
    if study is not None:
        recipe = moved(recipe, recipe.get("study"), str(study))
    check_recipe(recipe, path, trust, (Path(data_root), *([] if study is None else [study])), parts)
    for part in parts:
        try:
            check_values(OmegaConf.create(recipe[part]), part)
        except ValueError as error:
            raise ValueError(f"ckpt_path={path}: {error}") from error
    module = _built(recipe["module"], path, L.LightningModule, **recipe["spec"])
    module.recipe = recipe
    try:
        module.on_load_checkpoint(checkpoint)
    except ValueError as error:
        raise ValueError(f"ckpt_path={path}: {error}") from error
    module.load_state_dict(checkpoint["state_dict"])
    return module, recipe


def _built(node: Mapping[str, Any], path: Path, kind: type, **sizes: Any) -> Any:
    """What a part of a recipe describes, of a kind."""
    try:
        made = instantiate(node, **sizes)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | OSError):  # a sentence of its own
            raise error.__cause__ from None
        cause = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"ckpt_path={path}: can't build what it describes ({cause}).") from error
    if not isinstance(made, kind):
        raise ValueError(f"ckpt_path={path}: expected a {kind.__name__}, found {type(made).__name__}.")
    return made


def study_of(checkpoint: Path) -> Path | None:
    """The folder of the study that a checkpoint lies in, STUDY/ARM/SEED/checkpoints/last.ckpt; None if in none.

    An arm may be a path of two, as that of an experiment such as paper/NAME without arms.
    """
    return next((folder for folder in checkpoint.resolve().parents[3:5] if (folder / RUN_FILE).exists()), None)


def moved(node: Any, before: str | None, now: str) -> Any:
    """A recipe whose files in the folder that its study had are where that folder is now."""
    if isinstance(node, Mapping):
        return {key: moved(value, before, now) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [moved(value, before, now) for value in node]
    if before is not None and isinstance(node, str) and node.startswith(f"{before}/"):
        return now + node.removeprefix(before)
    return node


def check_recipe(
    recipe: Mapping[str, Any],
    path: Path,
    trust: tuple[str, ...],
    writable: tuple[Path, ...],
    parts: tuple[str, ...] = ("module", "datamodule"),
) -> None:
    """Raise a ValueError if parts of a recipe would call what they may not, or write out of the `writable` folders."""
    for name, value in recipe["spec"].items():  # goes into the module's arguments, over what they are
        sizes = value if isinstance(value, list | tuple) else [value]
        if name.startswith("_") or not all(isinstance(size, int | float | str) for size in sizes):
            raise ValueError(f"ckpt_path={path}: expected sizes in its spec, found {name}={value!r:.80}.")
        check_targets(value, f"ckpt_path={path}", key=f"spec.{name}")
    called = [each for part in parts for each in check_targets(recipe[part], f"ckpt_path={path}", trust, key=part)]
    writers = [each for each in called if getattr(each[1], MARK, None) is not None]
    for key, _, arguments in writers:
        if "_args_" in arguments or arguments["_target_"] in LOOK_UPS:
            raise ValueError(
                f"ckpt_path={path}: {key} may be written to: expected arguments by their names, found {arguments}."
            )
    # What is given later may come from elsewhere in the recipe, as arguments of an environment from a protocol.
    names = {getattr(made, MARK) for _, made, _ in writers}
    for part in ("spec", *parts):
        for key, folder in _leaves(recipe[part], part):
            within = any(Path(str(folder)).resolve().is_relative_to(each.resolve()) for each in writable)
            if key.rpartition(".")[2] in names and not within:
                raise ValueError(
                    f"ckpt_path={path}: {key}={folder} may be written to: expected a folder in "
                    f"data_root={writable[0]}; name yours by data_root=FOLDER."
                )


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of what is neither a dictionary, a list nor None, without what look-ups look up."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if node.get("_target_") not in LOOK_UPS:
                yield from _leaves(value, f"{key}.{name}")
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, key)
    elif node is not None:
        yield key, node


def check_targets(
    node: Any,
    where: str,
    trust: tuple[str, ...] = (),
    folders: tuple[str, ...] = FOLDERS,
    key: str = "",
    *,
    unmarked: bool = False,
) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """What a configuration calls: its place, the class or function, and the arguments. Nothing is called yet.

    Args:
        where: the file, for the error.
        trust: packages outside of the project whose classes may be called too.
        folders: of the project, from which classes may be called.
        key: of `node`.
        unmarked: whether of those packages every public class or function may be called.

    Raises:
        ValueError: it would call what is not of `KINDS` or marked `buildable`.
    """
    found = []
    if isinstance(node, str) and "${" in node:  # would be looked up once more, after this check
        raise ValueError(f"{where}: {key}: expected a value, found an interpolation.")
    if isinstance(node, Mapping):
        check_calling(node, f"{where}: {key}".rstrip())
        if "_target_" in node:
            looked_up = node["_target_"] in LOOK_UPS
            name = str(node.get("path" if looked_up else "_target_"))
            called = _buildable(name, f"{where}: {key}", trust, folders, unmarked)
            if looked_up and node.keys() != {"_target_", "path"}:
                raise ValueError(f"{where}: {key}: expected a look-up by path alone, found {', '.join(node)}.")
            found.append((key, called, node))
        for name, value in node.items():
            found += check_targets(value, where, trust, folders, f"{key}.{name}".lstrip("."), unmarked=unmarked)
    for index, value in enumerate(_list(node)):
        found += check_targets(value, where, trust, folders, f"{key}[{index}]", unmarked=unmarked)
    return found


def check_writes(
    called: list[tuple[str, Any, Mapping[str, Any]]], where: str, study: Path, typed: Collection[str]
) -> None:
    """Raise a ValueError if what a run's folder describes would write to files out of that folder.

    Data sets may go anywhere: what is made is new, and takes the place of nothing.

    Args:
        called: see `check_targets`.
        where: the file, for the error.
        study: the folder.
        typed: keys whose values a person has typed, who may have anything written anywhere.
    """
    for key, made, arguments in called:
        writes = inspect.isclass(made) and issubclass(made, WRITERS)
        if writes and (arguments["_target_"] in LOOK_UPS or arguments.get("_partial_")):  # to be given more elsewhere
            raise ValueError(f"{where}: {key}: expected a {made.__name__} that is built where it stands, found none.")
        if not inspect.isclass(made) or arguments["_target_"] in LOOK_UPS:
            continue
        named = ("folder", "path", "dir") if writes else getattr(made, "writes", ())
        if writes and "_args_" in arguments:
            raise ValueError(f"{where}: {key}: expected arguments by their names, found {arguments['_args_']}.")
        for name, text in _texts(arguments, key):
            path = Path(text)
            leads_away = writes and (path.is_absolute() or ".." in path.parts)
            if not leads_away and not name.endswith(named):
                continue
            # What `..` leads to depends on the folder that it is joined to.
            inside = ".." not in path.parts and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(study))
            if not inside and not any(f"{name}.".startswith(f"{own}.") for own in typed):
                raise ValueError(
                    f"{where}: {name}={text} may be written to: expected a folder in {study}; if it is yours, type it "
                    "too."
                )


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Those among a target's arguments, by their keys, without those of targets that are arguments themselves."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            if not (isinstance(value, Mapping) and "_target_" in value) and not name.startswith("_"):
                yield from _texts(value, f"{key}.{name}")
    for index, value in enumerate(_list(node)):
        if not (isinstance(value, Mapping) and "_target_" in value):
            yield from _texts(value, f"{key}[{index}]")


def foreign_packages(node: Any) -> set[str]:
    """Packages that a configuration calls something of, besides the project's."""
    if isinstance(node, Mapping):
        name = str(node.get("path" if node.get("_target_") in LOOK_UPS else "_target_", ""))
        own = not name or f"{name}.".startswith(tuple(f"{folder}." for folder in RUN_FOLDERS))
        return set().union([] if own else [name.partition(".")[0]], *map(foreign_packages, node.values()))
    return set().union(*map(foreign_packages, _list(node)))


def _list(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else ()


def _buildable(name: str, where: str, trust: tuple[str, ...], folders: tuple[str, ...], unmarked: bool) -> Any:
    """The class or function of a name, if it may be called."""
    trusted = tuple(f"{package}." for package in trust)
    packages = (*(f"{folder}." for folder in folders), *trusted)
    if not f"{name}.".startswith(packages):  # importing it may be harm enough
        package = name.partition(".")[0]
        raise ValueError(
            f"{where}: expected a class of this project, found {name}; if it is yours, add trust={package}."
        )
    try:
        found = get_object(name)
    except Exception as error:  # Hydra raises what importing raises
        raise ValueError(
            f"{where}: expected a class that there is, found {name}, which this version of the project does not have."
        ) from error
    kind = inspect.isclass(found) and issubclass(found, RUN_KINDS)  # of a recipe's folders, only KINDS can be reached
    marked = (inspect.isclass(found) or inspect.isfunction(found)) and hasattr(found, MARK)
    private = any(part.startswith("_") for part in name.split("."))
    origins = packages if kind or marked else trusted if unmarked and callable(found) else ()
    elsewhere = not f"{getattr(found, '__module__', None)}.".startswith(origins)
    if name not in folders and (private or elsewhere):
        raise ValueError(
            f"{where}: expected networks, data, environments, optimisers or what components.buildable.buildable marks, "
            f"found {name}."
        )
    return found
