"""Checks of configuration values against the classes and functions that they are meant for."""

import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Any, Union, get_args, get_origin

from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.checks import Count, CountOrZero, LearningRate, Momentum, NonNegative, Range, annotations, check_range
from components.structure import check_structure
from tenfold import PACKAGES

# Of classes that are not the project's, and check their numbers late, without a name, or not at all.
RANGES = {
    "torch.optim.": {
        "lr": LearningRate,
        "betas": tuple[Momentum, Momentum],
        "momentum": Momentum,
        "weight_decay": NonNegative,
    },
    "lightning.Trainer": {
        "devices": list[CountOrZero] | str | Annotated[int, Range(-1, 2**16)],  # which ones, or how many
        # The method's own counters end a run, and evaluations are whole.
        **{name: Annotated[int, Range(-1, -1)] for name in ("max_epochs", "max_steps")},
        **dict.fromkeys(("fast_dev_run", "max_time", "min_epochs", "min_steps", "overfit_batches"), types.NoneType),
        **{f"limit_{part}_batches": types.NoneType for part in ("train", "val", "test", "predict")},
        "reload_dataloaders_every_n_epochs": Annotated[int, Range(1, 1)],
        "check_val_every_n_epoch": Count,
        "num_sanity_val_steps": CountOrZero,
        "log_every_n_steps": Count,
    },
}

# What a configuration says of how a `_target_` is called.
CALLING = {"_target_": str, "_partial_": bool, "_recursive_": bool, "_convert_": str, "_args_": [object]}

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
MANY = {list: "a list", tuple: "a list", Sequence: "a list", Mapping: "KEY: VALUE pairs, as in {KEY: VALUE}"}


def check_values(config: DictConfig, key: str = "") -> None:
    """Compare the plain arguments below every `_target_` with their annotations, before anything is built.

    Raises:
        ValueError: a number, text or flag has another type than the parameter it is given to, or a number is out of its
            range; a target is not there, or does not take what it is given.
    """
    check_calling(OmegaConf.to_container(config, resolve=True), key)
    target = config.get("_target_")
    called = _target(target, key) if target else None
    parameters = {**dict(_parameters(called)), **_foreign_ranges(target)} if target else {}
    taken = _arguments(called) if target else None
    for name, value in config.items():
        path = f"{key}.{name}" if key else str(name)
        if taken is not None and name not in taken and not str(name).startswith("_"):
            known = one_of(taken, name) if taken else "nothing"
            raise ValueError(f"{path}: expected what {target.split('.')[-1]} takes ({known}), found {name}.")
        path = _set_by(config, name, path)
        if isinstance(value, DictConfig):
            check_values(value, path)
        if name in parameters and not (isinstance(value, DictConfig) and "_target_" in value):
            _check_value(path, value, parameters[name])
    environment, protocols = config.get("environment"), config.get("protocols")
    if isinstance(environment, DictConfig) and isinstance(protocols, DictConfig):
        for name, protocol in protocols.items():
            _check_protocol(protocol, f"{key}.protocols.{name}", environment.get("_target_"))


def check_calling(node: Mapping[str, Any], key: str) -> None:
    """Raise a ValueError if what says how a target is called is of another type than it has to be."""
    for name in CALLING.keys() & node.keys():
        check_structure(node[name], CALLING[name], f"{key}.{name}".lstrip("."))


def _check_protocol(protocol: Any, key: str, environment: str | None) -> None:
    """The same for a protocol of evaluation: what it has beside rewards are arguments of the environment.

    Raises:
        ValueError: it has no rewards, or they are not texts.
    """
    rewards = protocol.get("rewards") if isinstance(protocol, DictConfig) else None
    if isinstance(rewards, DictConfig | ListConfig):
        raw, known = (OmegaConf.to_container(rewards, resolve=resolve) for resolve in (False, True))
        pairs = zip(raw.values(), known.values()) if isinstance(raw, dict) else zip(raw, known)
        for written, value in pairs:
            elsewhere = re.fullmatch(r"\$\{([\w.]+)\}", str(written))
            if elsewhere and value is None:  # which is where a person set it
                raise ValueError(f"{elsewhere[1]}=null: expected a task or an expression, found null.")
    named = list(rewards.values()) if isinstance(rewards, DictConfig) else rewards
    if not isinstance(named, list | ListConfig) or not all(isinstance(reward, str) for reward in named):
        found = protocol if rewards is None else f"rewards={rewards}"
        raise ValueError(f"{key}: expected rewards, a list or expressions by their names, found {found}.")
    arguments = OmegaConf.to_container(protocol, resolve=True)
    arguments.pop("rewards")
    check_values(OmegaConf.create({"_target_": environment, **arguments}), key)


def check_types(config: DictConfig, annotations: Mapping[str, Any]) -> None:
    """Compare keys of a configuration with what they should be.

    Raises:
        ValueError: one has another type, or is out of its range.
    """
    for name, annotation in annotations.items():
        _check_value(name, config.get(name), annotation)


@contextmanager
def whole_keys(config: DictConfig) -> Iterator[None]:
    """Let errors of what a configuration builds name the keys that set what they name by NAME=VALUE.

    What refuses an argument knows its name, and not where in a configuration it stands.
    """
    try:
        yield
    except (ValueError, InstantiationException) as error:
        raised = error.__cause__ if isinstance(error, InstantiationException) else error
        if type(raised) is not ValueError:
            raise
        near = re.search(r"full_key: (\S+)", str(error)) if raised is not error else None
        raise ValueError(_with_whole_keys(str(raised), config, near[1] if near else "")) from raised


def _with_whole_keys(text: str, config: DictConfig, near: str) -> str:
    """The text with the keys of what it names; where several have the name and value, that of the part `near`."""
    values = dict(_values(config))

    def whole(named: re.Match[str]) -> str:
        name, rest = named.groups()
        keys = [key for key, read in values.items() if key.split(".")[-1] == name and re.match(read, rest)]
        if f"{near}.{name}" in keys:
            keys = [f"{near}.{name}"]
        setting = {set_by(config, key) for key in keys}
        return f"{setting.pop() if len(setting) == 1 else name}="

    return re.sub(r"(?<![\w.\]/-])(\w+)=(?=(.*))", whole, text)


def _values(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key, and a pattern of what its value may read like."""
    for name in config:
        key = f"{prefix}{name}"
        try:
            value = config[name]
        except OmegaConfBaseException:  # there is none
            continue
        texts = ("null", "None") if value is None else (str(value), repr(value))
        yield key, rf"({'|'.join(map(re.escape, texts))})(?!\w|\.\d)"
        if isinstance(value, DictConfig) and not OmegaConf.is_interpolation(config, name):
            yield from _values(value, f"{key}.")


def set_by(config: DictConfig, key: str) -> str:
    """The key that the value of a key is set by: another one where it is nothing but a reference to that."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    found = _set_by(node, name, key) if isinstance(node, DictConfig) and name in node else key
    return found if found == key else set_by(config, found)


def _set_by(config: DictConfig, name: str, path: str) -> str:
    """The same for a name in a part of a configuration, of which `path` is the key."""
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
            raise ValueError(f"{key}._target_={name}: {_missing(name, error.__cause__)}.") from error
        raise ValueError(f"{key}._target_={name}: expected something to import: {error}") from error


def _missing(target: str, error: ModuleNotFoundError) -> str:
    """What a target lacks: a package, or something in one that is there."""
    parent, _, name = (error.name or "").rpartition(".")
    inside = parent and f"{target}.".startswith(f"{error.name}.")
    return f"expected something in {parent}, found no {name}" if inside else missing_package(error)


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install, as the end of a sentence: what this project itself imports, or somebody else's package."""
    package = (error.name or str(error)).split(".")[0]
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if "importlib" not in frame.f_code.co_filename]
    ours = bool(frames) and frames[-1].f_globals["__name__"].split(".")[0] in PACKAGES
    advice = "make install, or pip install one of this project's extras" if ours else "installed, or on PYTHONPATH"
    return f"expected the package {package} ({advice}), found none"


def _parameters(called: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Names and annotations; those of base classes first, which a class may pass keywords on to."""
    if inspect.isclass(called):
        constructors = [vars(base)["__init__"] for base in reversed(called.__mro__) if "__init__" in vars(base)]
    else:
        constructors = [called]
    for constructor in constructors:
        with suppress(TypeError, ValueError):  # not written in Python
            yield from annotations(constructor).items()


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
        kinds = _kinds(annotation)
        expected = " or ".join(_described(kind) for kind in kinds)
        # An experiment may set parts of what another option brings.
        advice = f"; {key}=null leaves it out" if isinstance(value, DictConfig) and type(None) in kinds else ""
        raise ValueError(f"{key}={'null' if value is None else value}: expected {expected}{advice}.")
    check_range(key, value, annotation)


def _described(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list, each of it {_described(*get_args(kind))}"
    if _is_built(kind):
        return "a part with its _target_"
    return PLAIN.get(kind) or MANY.get(get_origin(kind), "null")


def _is_built(kind: Any) -> bool:
    """Whether values are functions or objects, of classes of this project or networks, which a `_target_` makes."""
    kind = get_origin(kind) or kind
    classes = ("torch.nn.", *(f"{package}." for package in PACKAGES))
    return kind is Callable or (isinstance(kind, type) and f"{kind.__module__}.".startswith(classes))


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value may be given where `annotation` stands; annotations that are not plain types always fit."""
    return any(_is_of(value, kind) for kind in _kinds(annotation))


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, ListConfig) and all(_fits(item, *get_args(kind)) for item in value)
    if _is_built(kind):
        return isinstance(value, DictConfig) and "_target_" in value
    if get_origin(kind) in MANY:
        return isinstance(value, DictConfig if get_origin(kind) is Mapping else ListConfig)
    if kind not in PLAIN and kind is not type(None):
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, str if kind is Path else kind) or (kind is float and isinstance(value, int))
