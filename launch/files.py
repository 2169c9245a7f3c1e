"""Small files that are either whole or absent."""

import json
from pathlib import Path
from typing import Any

from components.files import read_json, replacing
from components.structure import COUNT, NUMBER, check_structure

METRICS = {str: [NUMBER, ...]}
RECIPE = {"experiment": str, "study": (str, None), "spec": {str: object}, "module": dict, "datamodule": dict}
"""What a method and its data were made of."""
PROVENANCE = {
    "code": str,
    "versions": {str: str},
    "hardware": {"cpu": str, "cores": COUNT, "threads": COUNT, "memory_gb": NUMBER, "gpus": [str]},
}
RESULTS = {
    "updates": COUNT,
    "seconds": NUMBER,
    "metrics": METRICS,
    "recipe": (None, RECIPE),
    "provenance": (None, PROVENANCE),
}
"""Of one run or evaluation."""
REFERENCE_RESULTS = {str: METRICS}
COMPLETIONS = "completions.json"
COMPLETION_RESULTS = {str: [{"question": str, "answer": str, "completion": str, "right": bool}]}


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """The results of one run or evaluation, None for what a former version did not write.

    Raises:
        FileNotFoundError, ValueError: see `read_json`.
    """
    content = {"recipe": None, "provenance": None, **read_json(path, {})}
    check_structure(content, RESULTS, str(path))
    return content
