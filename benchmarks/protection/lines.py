"""The file of results: one JSON line a run, appended whole, no run twice."""

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protection.cells import Cell

Line = dict[str, Any]
Key = tuple[Cell, str]


def key_of(line: Line) -> Key:
    return Cell.of(line), line["model"]


def read_lines(paths: Iterable[Path]) -> list[Line]:
    """Return all whole lines, each run once; a line that a kill cut short is no result."""
    found: dict[Key, Line] = {}
    for path in paths:
        for text in path.read_bytes().splitlines() if path.exists() else []:
            line = _parsed(text)
            if line is not None:
                found.setdefault(key_of(line), line)
    return list(found.values())


def append(path: Path, line: Line) -> bool:
    """Write one line at the end of a file, unless its run is there already; tell whether it was written.

    A lock keeps other processes out meanwhile; a line cut short by a kill is closed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if key_of(line) in {key_of(other) for other in read_lines([path])}:
            return False
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        start = b"" if size == 0 or file.read(1) == b"\n" else b"\n"
        file.write(start + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return True


def missing(cells: Sequence[Cell], lines: Sequence[Line], model: str) -> list[Cell]:
    """Return the cells that the lines do not hold for a model, in order, each once."""
    there = {key_of(line) for line in lines}
    return [cell for cell in dict.fromkeys(cells) if (cell, model) not in there]


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
        key_of(line)
    except (ValueError, KeyError, TypeError):
        return None
    return line
