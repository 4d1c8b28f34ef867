"""Which tensors a command has finished in the folder it writes, so that it goes on after a kill; no torch.

A tensor's line is added when it is written, with the digests of what was read for it and of what was written. The next
run takes no line's word: it digests those bytes again. So it does not matter what a kill, or a machine without power,
left of the files and of the journal.
"""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from blake3 import blake3

from secvec.headers import TensorEntry
from secvec.provenance import digest_tensor

_NAME = "journal"


class Journal:
    """The journal in `folder`, begun anew unless one of the same `key` is there.

    key: as JSON, all that the result depends on besides the tensors' bytes; files: the names of those whose tensors the
    journal is about. Everything else in the folder is removed.
    """

    def __init__(self, folder: Path, key: Sequence[Any], files: Collection[str]) -> None:
        self._path = folder / _NAME
        first = json.dumps(blake3(json.dumps(key).encode()).hexdigest())
        self._found = _read(self._path, first)
        _clear(folder, {_NAME, *files} if self._found is not None else set())
        if self._found is None:
            self._path.write_text(first)

    def add(self, name: str, digests: Sequence[str], result: Any = None) -> None:
        """Note a finished tensor; `result`: what else is known about it, as JSON."""
        with self._path.open("ab", buffering=0) as file:
            # The break goes first: it ends a line that a kill cut short.
            file.write(f"\n{json.dumps([name, digests, result])}".encode())

    def kept(self, name: str, entries: Sequence[TensorEntry]) -> tuple[list[str], Any] | None:
        """Return the digests of `entries` and the result when they are, to the byte, what was noted for the tensor."""
        noted = (self._found or {}).get(name)
        if noted is None or [digest_tensor(entry) for entry in entries] != noted[0]:
            return None
        return noted

    def remove(self) -> None:
        self._path.unlink()


def layout(index: Mapping[str, TensorEntry]) -> list[Any]:
    """Return where a checkpoint's tensors lie and what they are, for a key."""
    return [[entry.name, entry.dtype, entry.shape, entry.file.name, entry.start] for entry in index.values()]


def _read(path: Path, first: str) -> Mapping[str, tuple[list[str], Any]] | None:
    """Return the lines by name, without one that was cut short, or None where there is no journal of this key."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    if lines[:1] != [first]:
        return None
    found: dict[str, tuple[list[str], Any]] = {}
    for line in lines[1:]:
        try:
            name, digests, result = cast(tuple[str, list[str], Any], json.loads(line))
        except ValueError:
            continue
        found[name] = (digests, result)
    return found


def _clear(folder: Path, kept: Collection[str]) -> None:
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
