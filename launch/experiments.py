"""The experiments that can be run, as their configuration files describe them."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def experiment_names() -> list[str]:
    """Names as they are given on the command line, `paper/...` last."""
    folder = CONFIGS / "experiment"
    names = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: ("/" in name, name))


def experiment_list() -> str:
    """One line for each experiment: its name, what it shows, and how long it should take."""
    names = experiment_names()
    width = max(map(len, names))
    lines = []
    for name in names:
        config = OmegaConf.load(CONFIGS / "experiment" / f"{name}.yaml")
        lines.append(f"  {name:<{width}}  {config.summary} [{config.duration}]")
    return "\n".join(lines)


def known_keys(experiment: str | None) -> list[str]:
    """Every key of an experiment's configuration, or of the bare one, in dotted form."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}"] if experiment in experiment_names() else [])
    return _dotted(config)


def _dotted(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in config:
        key = f"{prefix}{name}"
        child = config._get_node(name)
        keys += [key, *(_dotted(child, f"{key}.") if isinstance(child, DictConfig) and not child._is_none() else [])]
    return keys
