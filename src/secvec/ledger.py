"""A file of findings that grows: a first line says what they are about, each further one is a finding; no torch."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secvec.atomic import atomic_write
from secvec.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Ledger:
    """Findings on disk, each under its "key"; nothing that was added is lost on a kill."""

    path: Path

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any]) -> "Ledger":
        """Take up the file at `path`, or start it, readable by its owner alone.

        What a kill left of a last line is cut off. Raises UsageError when the file is about something else, and
        CheckpointError when it is none; either is left as it is.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with atomic_write(path, mode=0o600) as file:
                file.write(_line(about))
        there, here = _head(path), json.loads(_line(about))
        if differing := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
            name = differing[0]
            raise UsageError(
                f"{path}: {name} was {there.get(name)!r} and is now {here.get(name)!r}; give what it was made with, or "
                "name another folder"
            )
        _cut(path)
        return cls(path)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the findings by key. Raises CheckpointError on a line that is none."""
        lines = self.path.read_bytes().splitlines()[1:]
        found = [_parse(line, f"{self.path}:{number}") for number, line in enumerate(lines, start=2)]
        return {entry["key"]: entry for entry in found}

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write findings to the disk. Raises ValueError on NaN, OSError."""
        with self.path.open("ab") as file:
            file.write(b"".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())


def _head(path: Path) -> dict[str, Any]:
    """Return what a file says that it is about."""
    with path.open("rb") as file:
        return _parse(file.readline(), f"{path}:1", key="format")


def _parse(line: bytes, where: str, *, key: str = "key") -> dict[str, Any]:
    try:
        document = json.loads(line)
        if not isinstance(document[key], str):
            raise TypeError(key)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{where}: expected a finding, found something else; it was altered, or is not of secvec: delete the file, "
            "or name another folder"
        ) from error
    return document


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode("ascii") + b"\n"


def _cut(path: Path) -> None:
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
