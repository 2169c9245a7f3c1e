"""Checks of configuration values against the classes and functions that they are meant for."""

import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from components.checks import Count, CountOrZero, Momentum, NonNegative, Range, check_range

# Of classes that are not the project's, and check their numbers late, without a name, or not at all.
RANGES = {
    "torch.optim.": {
        "lr": NonNegative,
        "betas": tuple[Momentum, Momentum],
        "momentum": Momentum,
        "weight_decay": NonNegative,
    },
    "lightning.Trainer": {
        "devices": list[CountOrZero] | str | Annotated[int, Range(-1, 2**16)],  # which ones, or how many
        "max_epochs": Annotated[int, Range(-1, -1)],  # the method's own counters end a run
        "reload_dataloaders_every_n_epochs": Annotated[int, Range(1, 1)],
        "check_val_every_n_epoch": Count,
        "num_sanity_val_steps": CountOrZero,
        "log_every_n_steps": Count,
    },
}

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_values(config: DictConfig, key: str = "") -> None:
    """Compare the plain arguments below every `_target_` with their annotations, before anything is built.

    Raises:
        ValueError: a number, text or flag has another type than the parameter it is given to, or a number is out of its
            range; a target is not there, or does not take what it is given.
    """
    target = config.get("_target_")
    called = _target(target, key) if target else None
    parameters = {**dict(_parameters(called)), **_foreign_ranges(target)} if target else {}
    taken = _arguments(called) if target else None
    for name, value in config.items():
        path = f"{key}.{name}" if key else str(name)
        if taken is not None and name not in taken and not str(name).startswith("_"):
            known = one_of(taken, name) if taken else "nothing"
            raise ValueError(f"{path}: expected what {target.split('.')[-1]} takes ({known}), found {name}.")
        path = set_by(config, name, path)
        if isinstance(value, DictConfig):
            check_values(value, path)
        if name in parameters and not (isinstance(value, DictConfig) and "_target_" in value):
            _check_value(path, value, parameters[name])


def check_types(config: DictConfig, annotations: Mapping[str, Any]) -> None:
    """Compare keys of a configuration with what they should be.

    Raises:
        ValueError: one has another type, or is out of its range.
    """
    for name, annotation in annotations.items():
        _check_value(name, config.get(name), annotation)


def set_by(config: DictConfig, name: str, path: str) -> str:
    """The key that a value is set by: another one where it is nothing but a reference to that."""
    if not OmegaConf.is_interpolation(config, name):
        return path
    reference = re.fullmatch(r"\$\{(\w[\w.]*)\}", OmegaConf.to_container(config, resolve=False)[name])
    return reference[1] if reference else path


def _foreign_ranges(target: str) -> dict[str, Any]:
    return next((ranges for prefix, ranges in RANGES.items() if target.startswith(prefix)), {})


def one_of(names: Sequence[str], name: str) -> str:
    """What was expected instead of `name`, as a part of a sentence: all names if they are few, else those like it."""
    if len(", ".join(names)) <= 200:
        return f"one of {', '.join(names)}"
    close = difflib.get_close_matches(name, names, n=5) or names[:5]
    return f"one of {len(names)}, such as {', '.join(close)}"


def _target(name: str, key: str) -> Any:
    try:
        return get_object(name)
    except Exception as error:  # Hydra raises what importing raises
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise ValueError(f"{key}._target_={name}: {missing_package(error.__cause__)}.") from error
        raise ValueError(f"{key}._target_={name}: expected something to import: {error}") from error


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install, as the end of a sentence."""
    package = (error.name or str(error)).split(".")[0]
    return f"expected the package {package} (make install, or pip install one of this project's extras), found none"


def _parameters(called: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Names and annotations; those of base classes first, which a class may pass keywords on to."""
    if inspect.isclass(called):
        constructors = [vars(base)["__init__"] for base in reversed(called.__mro__) if "__init__" in vars(base)]
    else:
        constructors = [called]
    for constructor in constructors:
        try:
            parameters = inspect.signature(constructor, eval_str=True).parameters.values()
        except (TypeError, ValueError, NameError):  # not written in Python, or annotated for type checkers only
            continue
        yield from ((parameter.name, parameter.annotation) for parameter in parameters)


def _arguments(called: Callable[..., Any]) -> list[str] | None:
    """Names of what can be given; None if that can be anything, or can't be known."""
    # The metaclass of TorchRL's environments hides what their constructors take.
    hidden = inspect.isclass(called) and type(called).__call__ is not type.__call__
    try:
        parameters = dict(inspect.signature(called.__init__ if hidden else called).parameters)
    except (TypeError, ValueError):  # not written in Python
        return None
    parameters.pop("self", None)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if anything else list(parameters)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one there is, without their ranges."""
    union = get_origin(annotation) in (Union, types.UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    return tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds)


def _check_value(key: str, value: Any, annotation: Any) -> None:
    if not _fits(value, annotation):
        expected = " or ".join(_described(kind) for kind in _kinds(annotation))
        raise ValueError(f"{key}={'null' if value is None else value}: expected {expected}.")
    check_range(key, value, annotation)


def _described(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list, each of it {_described(*get_args(kind))}"
    return PLAIN.get(kind, "null")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value may be given where `annotation` stands; annotations that are not plain types always fit."""
    return any(_is_of(value, kind) for kind in _kinds(annotation))


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, ListConfig) and all(_fits(item, *get_args(kind)) for item in value)
    if kind not in PLAIN and kind is not type(None):
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))
