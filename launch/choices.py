"""Whether the options of groups that are chosen are what an experiment leaves of them."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.errors import CommandLineError
from launch.experiments import repository
from launch.overrides import SEARCH_PATH, given_value, override_key
from launch.values import one_of

ABSENT = object()


def check_choices(config: DictConfig, overrides: Sequence[str]) -> None:
    """Check that what chosen options are to build is what is built, in the configuration that overrides compose.

    What an experiment's file sets is merged over the options of groups, also over those that an arm or a person
    chooses: with a `_target_` of its own there, the choice would come to nothing and nobody would notice.

    Raises:
        CommandLineError: an experiment's file sets another `_target_` than that of an option, and no override does.
    """
    files = repository(given_value(overrides, SEARCH_PATH) or ())
    last = {override_key(override): override for override in overrides}
    composed = OmegaConf.to_container(config)
    for key, override in last.items():
        group, _, package = key.partition("@")
        if override.startswith("~") or group == "experiment" or not files.group_exists(group):
            continue
        names = OverridesParser.create().parse_override(override).value()
        for name in names if isinstance(names, list) else [names]:
            option = files.load_config(f"{group}/{name}")
            if option is None:  # none is chosen
                continue
            header = option.header["package"]
            home = package or (group.replace("/", ".") if header in (None, "_group_") else header)
            for where, target in _targets(OmegaConf.to_container(option.config), home.removeprefix("_global_")):
                typed = any(f"{where}._target_.".startswith(f"{other}.") for other in last if other != key)
                if typed or _target_at(composed, where) == target:
                    continue
                for file, found in _set_over(files, overrides, f"{group}/{name}", where, target):
                    begins = f" that begins with `# @package {header}`" if header else ""
                    raise CommandLineError(
                        f"{override}: expected {where} to be {target}, found {'null' if found is None else found}, "
                        f"which {file}.yaml sets over it; put that into a file DIR/{group}/NAME.yaml{begins} and "
                        f"choose it in the experiment's defaults by `override /{key}: NAME`, or leave {override} out"
                    )


def check_used(arms: Sequence[DictConfig], overrides: Sequence[str], known: Collection[str]) -> None:
    """Check that something refers to every key that a person sets of a group that is shared by parts, as `environment`.

    An experiment may have brought a key that what was chosen instead does not take, such as the domain of another
    environment.

    Args:
        arms: configurations, in one of which it has to be of use.
        known: first words of keys that are read by themselves.

    Raises:
        CommandLineError: setting a key came to nothing.
    """
    files = repository(given_value(overrides, SEARCH_PATH) or ())
    plain = [OmegaConf.to_container(config) for config in arms]
    references = set(re.findall(r"\$\{(?:\w+:\$\{)?([\w.]+)", json.dumps(plain, default=str)))
    for key in dict.fromkeys(override_key(override) for override in overrides if not override.startswith("~")):
        group, _, name = key.partition(".")
        if (
            not name
            or group in known
            or not files.group_exists(group)
            or not any(isinstance(each.get(group), Mapping) for each in plain)
        ):
            continue
        taken = sorted(each.removeprefix(f"{group}.") for each in references if each.startswith(f"{group}."))
        used = any(f"{key}.".startswith(f"{each}.") or each.startswith(f"{key}.") for each in references)
        if taken and not used:  # or it may be meant for something that reads the whole configuration
            raise CommandLineError(f"{key}: expected what {group} takes here, {one_of(taken, name)}, found {name}.")


def _targets(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Where something is built, and what; not the parts of what is built."""
    if isinstance(node, Mapping) and "_target_" in node:
        yield key, node["_target_"]
    elif isinstance(node, Mapping):
        for name, child in node.items():
            yield from _targets(child, f"{key}.{name}" if key else str(name))


def _target_at(node: Any, key: str) -> Any:
    """What is built at a key; the value there, or of what it is a part of, if it is no dictionary; `ABSENT` if none."""
    for name in (*filter(None, key.split(".")), "_target_"):
        if not isinstance(node, Mapping):
            return node
        node = node.get(name, ABSENT)
    return node


def _set_over(
    files: ConfigRepository, overrides: Sequence[str], option: str, key: str, target: str
) -> Iterator[tuple[str, Any]]:
    """Files of the experiment that set another `_target_` at a key after an option, the last first, and what it is."""
    loader = GlobalHydra.instance().config_loader()
    listed = loader.compute_defaults_list("train", list(overrides), RunMode.RUN).defaults
    parents = {part.config_path: part.parent for part in listed}
    for part in reversed(listed):
        if part.config_path == option:
            return
        above = part.config_path
        while above is not None and not above.startswith("experiment/"):
            above = parents.get(above)
        inside = f"{part.package}." if part.package else ""
        if above is None or not f"{key}.".startswith(inside):
            continue
        found = _target_at(OmegaConf.to_container(files.load_config(part.config_path).config), key[len(inside) :])
        if found not in (ABSENT, target):
            yield part.config_path, found
