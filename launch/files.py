"""Small files that are either whole or absent."""

import json
from pathlib import Path
from typing import Any

from components.files import replacing


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")
