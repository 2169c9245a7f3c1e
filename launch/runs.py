"""Where runs live, and how the one to resume is found."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from components.files import locking, read_text
from components.structure import check_structure
from launch.experiments import is_group
from launch.files import write_text
from launch.overrides import SEARCH_PATH, given_value, override_key, sets_hydra
from launch.resumptions import RESUMED

RUN_FILE = "run.yaml"
"""Marks the folder of a run; holds the overrides it was started with, and what was changed since."""
LOCK = ".lock"
STAMP = "%Y-%m-%d_%H-%M-%S-%f"
_made: list[Path] = []


def run_folder(output_root: Any, name: Any, ckpt_path: str | None) -> str:
    """The folder of a new run, made here so that no other program has it, or that of the one to resume.

    Raises:
        FileNotFoundError: `ckpt_path` names no run.
        ValueError: `output_root` or `name` name no folder, or another program has started several processes.
    """
    if ckpt_path is not None:
        return str(run_of(Path(ckpt_path)))
    if not isinstance(output_root, str) or not output_root or "${" in os.path.abspath(output_root):
        raise ValueError(f"output_root={output_root!r}: expected the path of a folder, without '${{' in it.")
    check_folder_name("name", name)
    processes, starter = started_by_others()
    if processes > 1:  # each would make a folder of its own
        raise ValueError(
            f"hydra.run.dir: expected one folder for the {processes} processes that {starter} has started, found none; "
            "add hydra.run.dir=FOLDER."
        )
    return str(new_folder(Path(output_root) / name))


def started_by_others() -> tuple[int, str]:
    """How many processes of a run another program has started, and its name; 1 where the run starts its own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "torchrun"
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)), "srun"


def check_folder_name(key: str, name: Any) -> None:
    """Raise a ValueError unless a folder of this name lies where it is expected to."""
    if (
        not isinstance(name, str)
        or not Path(name).parts
        or Path(name).is_absolute()
        or ".." in Path(name).parts
        or "${" in name
    ):
        raise ValueError(f"{key}={name!r}: expected a name for a folder in that of the runs.")


def new_folder(parent: Path) -> Path:
    """Make a folder named after the time, which no other program has."""
    missing = [each for each in (parent, *parent.parents) if not each.exists()]
    while True:
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / datetime.now().strftime(STAMP)
        with suppress(FileExistsError, FileNotFoundError):  # another program may just have removed an empty parent
            folder.mkdir()
            _made.extend([*reversed(missing), folder])
            return folder


def remove_empty_folders() -> None:
    """Remove what `new_folder` has made in this program, parents too, where nothing came of it."""
    while _made:
        with suppress(OSError):
            _made.pop().rmdir()


def read_overrides(folder: Path) -> list[str]:
    """What the run in a folder was started with; nothing if none was.

    Raises:
        FileNotFoundError, ValueError: the file is none, or damaged.
    """
    path = folder / RUN_FILE
    overrides = _read(path)["overrides"]
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:  # on the command line that is made of them it may be an option of Hydra's
            raise ValueError(f"{path}: expected overrides as they are typed, found {override!r:.80}.") from error
        key = override_key(override)
        if key == "trust" or (key != SEARCH_PATH and sets_hydra(override)):
            raise ValueError(f"{path}: expected what a run is made of, found {key}, which only a person may set.")
    return overrides


def read_resumed(folder: Path) -> list[Mapping[str, Any]]:
    """What was changed when the runs in a folder were resumed, see `launch.resumptions.RESUMED`."""
    return _read(folder / RUN_FILE)["resumed"]


def _read(path: Path) -> dict[str, Any]:
    if not path.exists() and not path.is_symlink():
        return {"overrides": [], "resumed": []}
    try:
        content = yaml.safe_load(read_text(path, "what a run was started with"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: expected YAML, found something else ({' '.join(str(error).split())}).") from error
    check_structure(content, {"overrides": [str]}, str(path))
    content = {"resumed": [], **content}  # a former version did not write it, nor does this one where nothing changed
    check_structure(content, {"resumed": RESUMED}, str(path))
    return content


def write_overrides(folder: Path, overrides: list[str], resumed: Sequence[Mapping[str, Any]] = ()) -> None:
    """Remember what a run was started with and what was changed, which makes the folder one that can be resumed."""
    content = {"overrides": overrides, **({"resumed": list(resumed)} if resumed else {})}
    write_text(folder / RUN_FILE, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))


def merged(folder: Path, given: Sequence[str]) -> list[str]:
    """The overrides of the run in a folder: what it was started with, if it was, then what is given now.

    Raises:
        ValueError: it is a run of another experiment than the one that is given, or has configurations in packages.
    """
    remembered = read_overrides(folder)
    if given_value(given, SEARCH_PATH) is None:  # else a person has named them
        for override in remembered:
            if override_key(override) == SEARCH_PATH and not _only_folders(given_value([override], SEARCH_PATH)):
                raise ValueError(
                    f"{folder / RUN_FILE}: expected folders, found {override}; if it is yours, type it too."
                )
    began, asked = ([o for o in part if override_key(o) == "experiment"][-1:] for part in (remembered, given))
    if began and asked and began != asked:
        raise ValueError(f"ckpt_path: expected a run of {asked[0]}, found one of {began[0]} in {folder}.")
    # What was added then may have a place of its own by now, and has none where it is given anew.
    remembered = lasting(remembered, given)
    added = {key: o[: o.index(key)] for o in remembered if o.startswith("+") and (key := override_key(o))}
    # What is given as it was before stays where it was, so that a run is told as if it had never stopped.
    # The last of a key is the one that counts.
    before, now = ({override_key(o): o for o in part} for part in (remembered, lasting(given, remembered)))
    given = [o for o in given if before.get(override_key(o)) != now[override_key(o)]]
    # The same override given again replaces its former value: a deletion or an addition can't be made twice.
    keys = {override_key(override) for override in given}
    kept = [override for override in remembered if override_key(override) not in keys]
    new = [override for override in given if not (override.startswith("~") and override_key(override) in added)]
    return [f"{added[key]}{o.lstrip('+')}" if (key := override_key(o)) in added else o for o in (*kept, *new)]


def _only_folders(search_path: Any) -> bool:
    """Whether nothing has to be imported to look configurations up."""
    return isinstance(search_path, list) and all(str(entry).startswith("file://") for entry in search_path)


def lasting(overrides: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """Overrides as they can be given again, to `more` too: what is added may be there by then. A group never is."""
    search_path = given_value([*overrides, *more], SEARCH_PATH) or ()
    return [
        f"++{o.lstrip('+')}" if o.startswith("+") and not is_group(override_key(o), search_path) else o
        for o in overrides
    ]


def newest_run(output_root: str, name: str, experiment: str) -> Path:
    """The folder of the newest run of an experiment, sweeps among them; says so if a newer one has nothing to resume.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(output_root)
    runs = {
        (run.parent.name, 0, ""): run.parent for run in (root / name).glob(f"*/{RUN_FILE}") if _is_stamp(run.parent)
    }
    for run in root.glob(f"sweep/*/*/{RUN_FILE}"):
        if f"experiment={experiment}" in read_overrides(run.parent):
            runs[run.parent.parent.name, len(run.parent.name), run.parent.name] = run.parent
    if not runs:  # but what has a name of its own, or is a copy
        runs = {("", run.stat().st_mtime, ""): run.parent for run in (root / name).glob(f"*/{RUN_FILE}")}
    if not runs:
        raise FileNotFoundError(f"ckpt_path=last: expected a run of {name} in {root / name}, found none.")
    newest = runs[max(runs)].resolve()
    empty = [folder for folder in (root / name).glob("*/") if _is_stamp(folder) and folder.name > max(runs)[0]]
    if empty:
        print(f"ckpt_path=last: {max(empty)} has nothing to go on with; the run before is {newest}.", flush=True)
    return newest


def _is_stamp(folder: Path) -> bool:
    """Whether a folder is named after the time at which it was made."""
    with suppress(ValueError):
        return bool(datetime.strptime(folder.name, STAMP))
    return False


def run_of(path: Path) -> Path:
    """The folder of the run that a path means: that folder itself, or a checkpoint in it.

    Raises:
        FileNotFoundError: there is none.
    """
    expected = f"ckpt_path={path}: expected a run's folder or a checkpoint in one"
    if not path.exists():
        raise FileNotFoundError(f"{expected}, found nothing.")
    path = path.resolve()
    for folder in (path, *path.parents):
        if (folder / RUN_FILE).is_file():
            return folder
    raise FileNotFoundError(f"{expected}, found neither.")


def check_links(folder: Path) -> None:
    """Raise a ValueError if a folder in that of a run is a link out of it: what it holds would be written to."""
    for parent, names, _ in os.walk(folder):
        for name in names:
            check_inside(Path(parent, name), folder)


def check_inside(path: Path, folder: Path) -> None:
    """Raise a ValueError if a path in a run's folder leads out of it."""
    found = os.path.realpath(path)
    if not Path(found).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path}: expected a folder in {folder}, found a link to {found}.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other programs out of a run's folder, until this one leaves it or dies.

    Raises:
        ValueError: another program is in it.
    """

    def taken() -> None:
        raise ValueError(f"{folder}: expected a run that no program is at work on, found one; wait for it, or stop it.")

    with locking(folder / LOCK, taken):
        yield
