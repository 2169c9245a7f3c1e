"""Tenfold as an installed program: `tenfold-train` and `tenfold-evaluate` are what `train.py` and `evaluate.py` are.

The one package whose name nobody else has: it looks whether those that it is made of are ours before it calls them.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

PACKAGES = ("callbacks", "components", "configs", "datamodules", "launch", "lightning_modules")


def train() -> NoReturn:
    """Train and evaluate what the command line asks for."""
    check_packages()
    from launch.errors import leave, run_reporting_errors
    from launch.program import main

    leave(run_reporting_errors(main))


def evaluate() -> NoReturn:
    """Evaluate the checkpoint that the command line names."""
    check_packages()
    from launch.errors import leave, run_reporting_errors
    from launch.evaluation import main

    leave(run_reporting_errors(main))


def check_packages() -> None:
    """End the program with a sentence where Python finds somebody else's package in the place of one of ours."""
    ours = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve() != ours / name / "__init__.py":
            found = spec.origin if spec is not None and spec.origin else "none"
            sys.exit(
                f"{name}: expected the package of that name which Tenfold has in {ours}, found {found}; rename yours, "
                "or leave its folder out of PYTHONPATH."
            )
