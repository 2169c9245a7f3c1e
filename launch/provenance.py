"""What made a run's numbers: the code, the versions of what it builds on, and the machine, which is not named."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
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
    if (ROOT / ".git").exists():  # a package that is installed may lie in somebody else's repository
        try:
            head, changed = (
                subprocess.run(
                    ["git", "--no-optional-locks", "-C", ROOT, *command], capture_output=True, text=True, check=True
                ).stdout
                for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
            )
            return head.strip() + "+" * bool(changed)
        except (OSError, subprocess.CalledProcessError):
            pass  # no git, or a repository of another user
    return _version("tenfold") or "unknown"


def provenance(gpus: list[int] | None = None) -> dict[str, Any]:
    """All of it, as it goes into results.json.

    Args:
        gpus: indices of those that were computed on.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _version(name) for name in PACKAGES}
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
