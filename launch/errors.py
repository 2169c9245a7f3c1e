"""Errors that a user can cause, as one sentence and an exit code."""

import difflib
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from launch.experiments import experiment_names, known_keys
from launch.values import missing_package

TRACEBACK = "TENFOLD_TRACEBACK"
RESOLVING = re.compile(r"\w+ raised while resolving interpolation: ")


class Stopped(BaseException):
    """The user or the machine ended the program; says how to go on, and the exit code.

    Not an `Exception`: nothing between a study and the command line may take it for an error and carry on.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class CommandLineError(ValueError):
    """A wrong command line; its text is the sentence to show."""


class _Escaped(BaseException):
    """Carries an error past Hydra, which would print a line of its own about it."""


@contextmanager
def errors_past_hydra() -> Iterator[None]:
    """Let errors reach `run_reporting_errors` as they are."""
    try:
        yield
    except Exception as error:
        raise _Escaped from error


def run_reporting_errors(main: Callable[[], None]) -> int:
    """Run a command-line program; returns its exit code: 0, 1 for wrong data or files, 2 for a wrong command line.

    With the environment variable TENFOLD_TRACEBACK=1 errors come with their traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function instead of being printed by Hydra
    try:
        main()
    except Stopped as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has been heard; what is left is to end other processes
        if _is_first_process():
            print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        if _is_first_process():
            print("Interrupted.", file=sys.stderr)
        return 130
    except (Exception, _Escaped) as raised:
        error = raised.__cause__ if isinstance(raised, _Escaped) else raised
        assert isinstance(error, Exception)
        report = None if os.environ.get(TRACEBACK) else _report(error)
        if report is None:
            raise error from None
        code, sentence = report
        print(f"{sentence} ({TRACEBACK}=1 shows where.)", file=sys.stderr)
        del error
    else:
        return 0
    # What only the error's traceback held goes now: TorchRL's collectors of other processes hang if they have to shut
    # down while the interpreter does.
    gc.collect()
    return code


def _is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _report(error: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence of an error, or None if no user can have caused it."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        found = re.search(r"full_key: (\S+)", str(error))
        report = _report(error.__cause__)
        if report is not None:
            return report
        from lightning.pytorch.utilities.exceptions import MisconfigurationException  # takes seconds: only if needed

        if isinstance(error.__cause__, TypeError | MisconfigurationException):  # an argument that does not fit
            return 2, f"{found.group(1) if found else 'The configuration'}: {_one_line(error.__cause__)}."
        return None
    if isinstance(error, OmegaConfBaseException) and (found := RESOLVING.match(str(error))):
        return 1, f"{_one_line(error)[found.end() :]}."
    if isinstance(error, OverrideParseException):
        return (
            2,
            f"Can't read {error.override}: expected key=value, quoted as 'key=\"value\"' if it has special characters.",
        )
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError) and not _given_experiment():
        names = ", ".join(experiment_names())
        return 2, f"Which experiment? Add experiment=NAME, NAME one of {names}; --help describes them."
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file)
        if missing.startswith("experiment/"):
            name, names = missing.removeprefix("experiment/"), experiment_names()
            return 2, f"Unknown experiment={name}: expected one of {', '.join(names)}.{_hint(name, names)}"
        options = f": expected one of {', '.join(error.options)}" if error.options else ""
        return 2, f"Unknown option {missing}{options}."
    if isinstance(error, ConfigCompositionException):
        unknown = re.search(r"Could not override '([^']+)'", str(error))
        if unknown:
            key, known = unknown.group(1), known_keys(_given_experiment())
            if key in known:  # it was given a dictionary with keys of its own
                return 2, f"{key} can't be replaced as a whole: set its keys one by one, new ones as +{key}.NAME=VALUE."
            return 2, f"Unknown key {key}: expected one of this experiment's.{_hint(key, known)}"
        cause = f": {_one_line(error.__cause__)}" if error.__cause__ is not None else ""
        return 2, f"{_one_line(error)}{cause}."
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 2, f"{_one_line(error)}."
    if isinstance(error, CommandLineError):
        return 2, f"{_one_line(error)}."
    if isinstance(error, ModuleNotFoundError):
        return 1, f"{_one_line(error)}: {missing_package(error)}."
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return 1, f"{where}expected to read or write it, found: {error.strerror}."
    if isinstance(error, ValueError | OSError):
        return 1, f"{_one_line(error)}."
    return None


def _given_experiment() -> str | None:
    """The experiment named on the command line."""
    given = [argument.split("=", 1)[1] for argument in sys.argv[1:] if argument.startswith("experiment=")]
    return given[-1] if given else None


def _hint(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".!") if lines else type(error).__name__
