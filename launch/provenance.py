"""What made a run's numbers: the code, the versions of what it builds on, and the machine, which is not named."""

import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "lightning",
    "torchrl",
    "tensordict",
    "numpy",
    "mujoco",
    "dm_control",
    "gymnasium",
    "compressai",
    "constriction",
    "transformers",
    "peft",
)


@cache
def code() -> str:
    """The commit that is checked out, with a + if files have changed since; else a version. Once for the program."""
    # A package that is installed may lie in somebody else's repository.
    commit = _commit(ROOT) if (ROOT / ".git").exists() else None
    return commit or _version("tenfold") or "unknown"


@cache
def package_code(name: str) -> str:
    """The same of a person's own package or module: the commit of the repository that has it, else its version."""
    spec = find_spec(name)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    found = [Path(place).resolve() for place in places if place is not None and Path(place).exists()]
    commit = _commit(found[0].parent, found[0]) if found else None
    return commit or _version(name) or next(map(version, packages_distributions().get(name, ())), "unknown")


def _commit(folder: Path, file: Path | None = None) -> str | None:
    """What is checked out in the repository that a folder lies in; None without one, or if a file is no part of it."""
    commands = [["rev-parse", "HEAD"], ["status", "--porcelain"]]
    commands += [] if file is None else [["ls-files", "--error-unmatch", str(file)]]
    try:
        head, changed, *_ = (
            subprocess.run(
                ["git", "--no-optional-locks", "-C", folder, *command], capture_output=True, text=True, check=True
            ).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository of another user
        return None
    return head.strip() + "+" * bool(changed)


def provenance(gpus: list[int] | None = None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """All of it, as it goes into results.json.

    Args:
        gpus: indices of those that were computed on.
        packages: a person's own that the run is made of.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _version(name) for name in LIBRARIES} | {name: package_code(name) for name in sorted(packages)}
    return {
        "code": code(),
        "versions": {name: found for name, found in versions.items() if found is not None},
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "gpus": [torch.cuda.get_device_name(index) for index in gpus or ()],
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
