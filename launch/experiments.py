"""The experiments that can be run, as their configuration files describe them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository  # what Hydra itself looks configurations up in
from hydra._internal.utils import create_config_search_path
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def experiment_names(search_path: Sequence[str] = ()) -> list[str]:
    """Names as they are given on the command line, `paper/...` last.

    Args:
        search_path: where more are found, as in `hydra.searchpath`.
    """
    return _names(repository(search_path))


def experiment_list(search_path: Sequence[str] = ()) -> str:
    """One line for each experiment: its name, what it shows, and how long it should take."""
    files = repository(search_path)
    names = _names(files)
    width = max(map(len, names))
    lines = []
    for name in names:
        config = files.load_config(f"experiment/{name}").config
        duration = f" [{config.duration}]" if "duration" in config else ""
        lines.append(f"  {name:<{width}}  {config.get('summary', '')}{duration}")
    return "\n".join(lines).replace("$", "$$")  # Hydra puts it into a template


def missing_folders(search_path: Sequence[str]) -> list[str]:
    """Those folders and packages of a search path that are not there."""
    return [source.path for source in repository(search_path).get_sources() if not source.available()]


def is_group(key: str, search_path: Sequence[str] = ()) -> bool:
    """Whether a key chooses one of several files."""
    return repository(search_path).group_exists(key.split("@")[0])


def options_with(group: str, key: str, search_path: Sequence[str] = ()) -> list[str]:
    """Those options of a group whose own file sets a key."""
    files = repository(search_path)
    options = files.get_group_options(group, ObjectType.CONFIG)
    return [name for name in options if OmegaConf.select(files.load_config(f"{group}/{name}").config, key) is not None]


def known_keys(overrides: Sequence[str]) -> list[str]:
    """Every key of the configuration that overrides compose, in dotted form."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return keys_of(compose("train", list(overrides)))


def arms_with(key: str, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Those arms, and their overrides, of the experiment that overrides compose whose configuration has a key."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        arms = OmegaConf.to_container(compose("train", list(overrides)))["arms"] or {}
        return {arm: own for arm, own in arms.items() if own and key in keys_of(compose("train", [*own, *overrides]))}


def repository(search_path: Sequence[str]) -> ConfigRepository:
    """What configurations are looked up in: the project's own, and more as in `hydra.searchpath`."""
    path = create_config_search_path(str(CONFIGS))
    for entry in search_path:
        path.append("hydra.searchpath", entry)
    return ConfigRepository(path)


def _names(repository: ConfigRepository) -> list[str]:
    def options(group: str, kind: ObjectType) -> list[str]:
        # what is hidden, such as the copies of a Mac or of notebooks, is no experiment
        return [name for name in repository.get_group_options(group, kind) if not name.startswith(".")]

    def below(group: str) -> Iterator[str]:
        yield from (f"{group}/{name}" for name in options(group, ObjectType.CONFIG))
        for name in options(group, ObjectType.GROUP):
            yield from below(f"{group}/{name}")

    names = [name.removeprefix("experiment/") for name in below("experiment")]
    return sorted(names, key=lambda name: ("/" in name, name))


def keys_of(config: DictConfig, prefix: str = "") -> list[str]:
    """Every key of a configuration, in dotted form."""
    keys = []
    for name in config:
        key = f"{prefix}{name}"
        child = config._get_node(name)
        keys += [key, *(keys_of(child, f"{key}.") if isinstance(child, DictConfig) and not child._is_none() else [])]
    return keys
