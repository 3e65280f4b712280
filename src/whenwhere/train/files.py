"""How a training run is written down."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save_whole(content: Mapping[str, Any], path: Path) -> None:
    """Write one file; a crash in the middle leaves the older file whole."""
    beside = path.with_suffix(".part")
    torch.save(dict(content), beside)
    beside.replace(path)


def append_row(row: Mapping[str, Any], path: Path) -> None:
    """Append one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
