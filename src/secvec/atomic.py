"""Write a file whole or not at all: after a crash the old content or the new one is there, never a part."""

import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | Path, *, mode: int = 0o644) -> Generator[BinaryIO]:
    """Yield a binary file that becomes `path`, with exactly the permissions `mode`, when the block ends well.

    On any error, an interrupt included, `path` is left as it was and the temporary file beside it is removed; a kill
    leaves at most that file, named `.NAME.*.tmp` and readable by the owner alone. A symbolic link is replaced.
    Raises OSError.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:32]}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: str | Path, document: Mapping[str, Any], mode: int = 0o644) -> None:
    """Write a JSON object atomically, in ASCII, keys in order given. Raises ValueError on NaN, TypeError, OSError."""
    data = json.dumps(document, indent=2, allow_nan=False).encode("ascii") + b"\n"
    with atomic_write(path, mode=mode) as file:
        file.write(data)


def _sync_folder(folder: Path) -> None:
    """The rename itself lives in the folder, which has a buffer of its own."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
