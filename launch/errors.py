"""Errors that a user can cause, as one sentence and an exit code."""

import difflib
import os
import re
import sys
from collections.abc import Callable

from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from launch.experiments import experiment_names

TRACEBACK = "TENFOLD_TRACEBACK"


def run_reporting_errors(main: Callable[[], None]) -> int:
    """Run a command-line program; returns its exit code: 0, 1 for wrong data or files, 2 for a wrong command line.

    With the environment variable TENFOLD_TRACEBACK=1 errors come with their traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function instead of being printed by Hydra
    try:
        main()
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        report = _report(error)
        if report is None:
            raise
        code, sentence = report
        print(f"{sentence} ({TRACEBACK}=1 shows where.)", file=sys.stderr)
        return code
    return 0


def _report(error: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence of an error, or None if no user can have caused it."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        found = re.search(r"full_key: (\S+)", str(error))
        report = _report(error.__cause__)
        if report is not None:
            return report
        if isinstance(error.__cause__, TypeError):  # an argument that the class does not have, or lacks
            return 2, f"{found.group(1) if found else 'The configuration'}: {_one_line(error.__cause__)}."
        return None
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file)
        if missing.startswith("experiment/"):
            name, names = missing.removeprefix("experiment/"), experiment_names()
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            return 2, f"Unknown experiment={name}: expected one of {', '.join(names)}.{hint}"
        options = f": expected one of {', '.join(error.options)}" if error.options else ""
        return 2, f"Unknown option {missing}{options}."
    if isinstance(error, ConfigCompositionException):
        cause = f": {_one_line(error.__cause__)}" if error.__cause__ is not None else ""
        return 2, f"{_one_line(error)}{cause}."
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 2, f"{_one_line(error)}."
    if isinstance(error, ValueError | FileNotFoundError):
        return 1, _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") + ("." if isinstance(error, ValueError | FileNotFoundError) else "")
