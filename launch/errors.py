"""Errors that a user can cause, as one sentence and an exit code."""

import atexit
import difflib
import gc
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from components.files import OUT_OF_MEMORY
from launch.experiments import arms_with, experiment_names, known_keys
from launch.overrides import SEARCH_PATH, given_value, override_key, quoted
from launch.values import missing_package, one_of

TRACEBACK = "TENFOLD_TRACEBACK"
MOST_CHARACTERS = 300  # of what others say at length
LONGEST = 2000  # characters of a sentence, and ...
END = 400  # ... of what it ends with, if something between is left out
PATIENCE = 10.0  # seconds in which the first process, refused as others were, has said so
TECHNICAL = re.compile(r"(object|reference)_type=|full_key")
KEY = re.compile(r"full_key: (\S+)")
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
    """Let errors reach `run_reporting_errors` as they are; those of a sweep's runs are Hydra's, which goes on."""
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _release(error)
            raise
        raise _Escaped from error


def _release(error: BaseException | None) -> None:
    """Let go of what the frames of an error and its causes hold, such as a model."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def run_reporting_errors(main: Callable[[], None]) -> int:
    """Run a command-line program; returns its exit code.

    That is 0; 1 for wrong values, data or files; 2 for a command line that can't be read or names keys or options that
    do not exist; 128 and the number of the signal that stopped it, so 130 for Ctrl-C.

    With the environment variable TENFOLD_TRACEBACK=1 errors come with their traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function instead of being printed by Hydra
    try:
        main()
    except Stopped as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has been heard; what is left is to end other processes
        if is_first_process():
            print(stop, file=sys.stderr)
        else:
            _first_process_ends()
        return stop.code
    except KeyboardInterrupt:
        if is_first_process():
            print("Interrupted.", file=sys.stderr)
        else:
            _first_process_ends()
        return 130
    except (Exception, _Escaped) as raised:
        error = raised.__cause__ if isinstance(raised, _Escaped) else raised
        assert isinstance(error, Exception)
    else:
        return 0
    report = None if os.environ.get(TRACEBACK) else _report(error)
    if report is None:
        raise error  # out here it has no more to say than what it was caused by
    code, sentence = report
    if not is_first_process() and _first_process_ends():  # it was refused too, and has said it
        return code
    sentence = re.sub(r"(\?|\.\.\.)\.$", r"\1", sentence)  # what others say may end with a mark of its own
    if len(sentence) > LONGEST:  # something that was found is said whole
        sentence = f"{sentence[: LONGEST - END]} ... {sentence[-END:]}"
    print(f"{sentence} ({TRACEBACK}=1 shows where.)", file=sys.stderr)
    del error
    if multiprocessing.active_children():
        # What only the error's traceback held goes now: TorchRL's collectors of other processes hang if they have to
        # shut down while the interpreter does.
        gc.collect()
    return code


def leave(code: int) -> NoReturn:
    """End the program with an exit code, and leave its memory to the system.

    To take the interpreter apart object by object takes seconds, of the few that a scheduler gives a program to end.
    """
    threading._shutdown()  # waits for threads, as the interpreter would, and then calls what is to be called at exit
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):  # nobody reads on
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _first_process_ends() -> bool:
    """Give the process that has started this one time to say what it has to say, and tell whether it has ended.

    As soon as one of the others fails, Lightning kills the first.
    """
    parent, until = os.getppid(), time.monotonic() + PATIENCE
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.05)
    return os.getppid() != parent


def _report(error: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence of an error, or None if no user can have caused it."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        found = KEY.search(str(error))
        report = _report(error.__cause__)
        if report is not None:
            return report
        from lightning.pytorch.utilities.exceptions import MisconfigurationException  # takes seconds: only if needed

        if isinstance(
            error.__cause__, TypeError | MisconfigurationException
        ):  # an argument, or its value, does not fit
            code = 2 if isinstance(error.__cause__, TypeError) else 1
            argument = re.search(r"unexpected keyword argument '(\w+)'", str(error.__cause__))
            where = f"{found[1] if found else 'The configuration'}{f'.{argument[1]}' if argument else ''}"
            return code, f"{where}: {_one_line(error.__cause__)}."
        return None
    if isinstance(error, OmegaConfBaseException) and RESOLVING.match(str(error)):
        raised: BaseException | None = error
        while isinstance(raised, OmegaConfBaseException):
            raised = raised.__context__
        if isinstance(raised, OSError):
            return _report(raised)
        return 1, f"{RESOLVING.sub('', _one_line(error))}."
    if isinstance(error, OverrideParseException):
        key, value = override_key(error.override), "key=value, quoted as 'key=\"value\"' if it has special characters"
        if key.split(".")[0] == "arms":
            value = 'the overrides of an arm in quotes, as in \'+arms.NAME=["KEY=VALUE","KEY=VALUE"]\''
        return 2, f"Can't read {error.override}: expected {value}."
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError) and not _given_experiment():
        names = ", ".join(name for name in _experiments() if "/" not in name)
        return 2, f"Which experiment? Add experiment=NAME, NAME one of {names}; --help describes them, and more."
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        missing = str(error).splitlines()[0].split(": ")[-1]
        return 2, f"{missing}: expected a value in experiment={_given_experiment()} or on the command line, found none."
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file)
        if missing.startswith("experiment/"):
            name, names = missing.removeprefix("experiment/"), _experiments()
            return 2, f"Unknown experiment={name}: expected {one_of(names, name)}."
        options = f": expected {one_of(error.options, missing.split('/')[-1])}" if error.options else ""
        return 2, f"Unknown option {missing}{options}."
    if isinstance(error, ConfigCompositionException):
        unknown = re.search(r"Could not override '([^']+)'", str(error))
        if unknown and unknown[1] in map(override_key, sys.argv[1:]):
            return 2, _unknown(unknown[1])
        absent = re.search(r"Could not delete from config. '([^']+)' does not exist", str(error))
        if absent and f"~{absent[1]}" in sys.argv[1:]:
            return 2, f"~{absent[1]}: {_unknown(absent[1])}"
        cause = f": {_one_line(error.__cause__)}" if error.__cause__ is not None else ""
        return 2, f"{_one_line(error)}{cause}."
    if isinstance(error, HydraException | OmegaConfBaseException):
        key = KEY.search(str(error))
        where = f"{key[1]}: " if key and key[1] not in _one_line(error) else ""
        return 2, f"{where}{_one_line(error)}."
    if isinstance(error, CommandLineError):
        return 2, f"{_one_line(error)}."
    if isinstance(error, yaml.YAMLError):  # of a configuration; names the file
        return 1, f"{_one_line(error)}."
    if isinstance(error, ModuleNotFoundError):
        return 1, f"{_one_line(error)}: {missing_package(error)}."
    asked = OUT_OF_MEMORY.search(str(error))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and asked):
        how_much = f" ({asked[0]})" if asked else ""
        return 1, f"Out of memory{how_much}: smaller networks, batches or numbers of environments take less."
    if isinstance(error, OSError) and error.errno is not None:
        where = "a file or pipe" if error.filename is None else os.fsdecode(error.filename)
        return 1, f"{where}: expected to read or write it, found: {error.strerror}."
    if isinstance(error, ValueError | OSError):
        return 1, f"{_one_line(error)}."
    return None


def _unknown(key: str) -> str:
    """What is wrong with a key that an override would change."""
    keys = (SEARCH_PATH, "experiment") if _given_experiment() in _experiments() else ()  # not in a sweep over several
    given = [argument for argument in sys.argv[1:] if override_key(argument) in keys]
    known = known_keys(given)
    if key in known:  # it was given a dictionary with keys of its own
        another = f", another class as {key}._target_=CLASS" if f"{key}._target_" in known else ""
        return (
            f"{key} can't be replaced as a whole: set its keys one by one, new ones as +{key}.NAME=VALUE{another}, and "
            f"take out what is too much by '~{key}.NAME'."
        )
    for arm, overrides in arms_with(key, given).items():
        typed = f"arms.{arm}=[{','.join(map(quoted, [*overrides, f'{key}=VALUE']))}]"
        return f"Unknown key {key}: only the arm {arm} has it, for which it is typed as {shlex.quote(typed)}."
    close = difflib.get_close_matches(key, known, n=1)
    parent, _, name = key.rpartition(".")
    beside = [each.removeprefix(f"{parent}.") for each in known if parent and each.rpartition(".")[0] == parent]
    expected = f"{one_of(beside, name)} in {parent}" if beside else "one of this experiment's"
    return f"Unknown key {key}: expected {expected}.{f' Did you mean {close[0]}?' if close else ''}"


def _experiments() -> list[str]:
    return experiment_names(given_value(sys.argv[1:], SEARCH_PATH) or ())


def _given_experiment() -> str | None:
    """The experiment named on the command line."""
    return given_value(sys.argv[1:], "experiment")


def _one_line(error: BaseException) -> str:
    """What an error says: its first line, and of others, where Hydra has the cause, what fits into a sentence."""
    lines = [line.strip().rstrip(".:!") for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not TECHNICAL.match(line)]
    if not lines:
        return type(error).__name__
    first, rest = lines[0], "; ".join(lines[1:])
    room = MOST_CHARACTERS - len(first)
    if len(rest) > room:
        rest = f"{rest[: max(room, 0)].rpartition(' ')[0]} ..."
    return f"{first}{'' if first.endswith('?') else ':'} {rest}" if rest.strip(" .") else first
