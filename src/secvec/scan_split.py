"""Write the rows of a scanned file into two: those to keep and those held back; no torch."""

from collections.abc import Iterable
from pathlib import Path

from secvec.atomic import atomic_write
from secvec.errors import InputError
from secvec.scan_rows import ScannedRow

_MODE = 0o600
_BOM = b"\xef\xbb\xbf"


def split_names(data: Path) -> tuple[str, str]:
    """Return the names of the two files, of the kind that `data` is."""
    suffix = ".txt" if data.suffix.lower() == ".txt" else ".jsonl"
    return f"kept{suffix}", f"held-back{suffix}"


def write_split(data: Path, rows: Iterable[ScannedRow], out: Path) -> None:
    """Write each line of `data` byte for byte into one of two files in `out`, mode 0600, by whether it is suspect.

    data: a file in which each row is a line; blank lines go nowhere. Raises InputError when `data` is another file than
    the one that was scanned.
    """
    kept, held_back = (out / name for name in split_names(data))
    scanned = iter(rows)
    with data.open("rb") as file, atomic_write(kept, mode=_MODE) as keep, atomic_write(held_back, mode=_MODE) as hold:
        for number, line in enumerate(file, start=1):
            if not (line.removeprefix(_BOM) if number == 1 else line).strip():
                continue
            row = next(scanned, None)
            if row is None or row.line != number:
                raise InputError(f"{data}:{number}: expected the file that was scanned, found another row; scan anew")
            (hold if row.suspect else keep).write(line)
