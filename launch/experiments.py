"""The experiments that can be run, as their configuration files describe them."""

from pathlib import Path

from omegaconf import OmegaConf

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
