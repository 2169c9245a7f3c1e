"""The record of a run as CSV files that survive interruption."""

import csv
import io
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from components.files import naming, read_text, replacing, visible_files

CLOCKS = ("updates", "env_steps", "seconds")


class RunLog(Logger):
    """Writes `train.csv` and `eval.csv` (one file for each first word of the metrics' names), a row for each record.

    Every row starts with the clocks `updates`, `env_steps` and `seconds`. When a run is resumed, rows that were written
    after its checkpoint are dropped, so that the files read as if the run had never stopped.

    Args:
        folder: where the files are written.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._headers: dict[Path, list[str]] = {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's configuration is stored beside the log, not in it."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        clocks = {name: metrics[name] for name in CLOCKS if name in metrics}
        groups: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            if name not in CLOCKS and "/" in name:
                group, rest = name.split("/", 1)
                groups.setdefault(group, dict(clocks))[rest] = value
        for group, row in groups.items():
            self._append(self.folder / f"{group}.csv", row)

    @rank_zero_only
    def rewind(self, updates: int) -> None:
        """Drop every row after the given number of updates."""
        for path in _logs(self.folder):
            header, rows = read_rows(path)
            _write_whole(path, header, [row for row in rows if int(row["updates"]) <= updates])

    def _append(self, path: Path, row: Mapping[str, float]) -> None:
        header = self._headers.get(path)
        if header is None or set(row) - set(header):
            known, rows = read_rows(path) if path.exists() else ([], [])
            header = self._headers[path] = [*known, *(name for name in row if name not in known)]
            _write_whole(path, header, [*rows, row])
            return
        line = io.StringIO()
        csv.DictWriter(line, header).writerow(row)
        with naming(path), open(path, "a") as file:  # one write: a kill leaves at most one torn line at the end
            file.write(line.getvalue())


def recorded(folder: Path, updates: int) -> list[dict[str, float]]:
    """What was logged to a run's folder up to the given number of updates, in the order in which it was logged."""
    records = []
    for path in _logs(folder):
        for row in read_rows(path)[1]:
            values = {
                name if name in CLOCKS else f"{path.stem}/{name}": int(text) if name == "updates" else float(text)
                for name, text in row.items()
                if text
            }
            records.append(values)
    records.sort(key=lambda record: (record["updates"], record["seconds"]))
    return [record for record in records if record["updates"] <= updates]


def _logs(folder: Path) -> list[Path]:
    """Those of a run's files that are its record; a person may have put tables of another kind beside them."""
    known = {f"{group}.csv" for group in ("train", "eval")}
    return [path for path in visible_files(folder, "*.csv") if path.name in known or _columns(path)[:1] == CLOCKS[:1]]


def _columns(path: Path) -> tuple[str, ...]:
    return tuple(csv.DictReader(io.StringIO(read_text(path, "the log of a run"))).fieldnames or ())


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of the record of a run, without a line that was torn by a kill.

    Raises:
        FileNotFoundError, ValueError: the file is none, or damaged; names the line.
    """
    text = read_text(path, "the log of a run")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    header = list(reader.fieldnames or [])
    if header and not set(CLOCKS) <= set(header):
        raise ValueError(f"{path}: expected the columns {', '.join(CLOCKS)}, found {', '.join(header)[:80]}.")
    rows = []
    for row in _whole(reader, path):
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise ValueError(f"{where}: expected {len(header)} values as in its first line, found another number.")
        for name, value in row.items():
            number = int if name in ("updates", "env_steps") else float
            try:
                number(value or ("x" if name in CLOCKS else 0))
            except ValueError:
                raise ValueError(f"{where}: expected a number as {name}, found {value[:40]!r}.") from None
        rows.append(row)
    return header, rows


def _whole(reader: csv.DictReader, path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected values, found others ({error}).") from error


def _write_whole(path: Path, header: list[str], rows: list[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(rows)
