"""Write the rows of scanned files into two: those to keep and those held back; no torch."""

from collections.abc import Iterable
from pathlib import Path

from secvec.atomic import atomic_write
from secvec.datafiles import DataFiles
from secvec.errors import InputError
from secvec.lines import BOM
from secvec.samples import line_suffix
from secvec.scan_rows import ScannedRow
from secvec.unpack import opened

_MODE = 0o600


def write_split(data: DataFiles, rows: Iterable[ScannedRow], out: Path) -> tuple[Path, Path]:
    """Write each line of `data` byte for byte into one of two files in `out`, mode 0600, by whether it is suspect.

    data: files in which each row is a line; blank lines go nowhere, and what was packed is written unpacked. Raises
    InputError when `data` is not what was scanned.
    """
    kept, held_back = (out / f"{name}{line_suffix(data)}" for name in ("kept", "held-back"))
    scanned = iter(rows)
    with atomic_write(kept, mode=_MODE) as keep, atomic_write(held_back, mode=_MODE) as hold:
        for path in data.files:
            with opened(path) as file:
                for number, line in enumerate(file, start=1):
                    line = line.removeprefix(BOM) if number == 1 else line
                    if not line.strip():
                        continue
                    row = next(scanned, None)
                    if row is None or (row.file, row.line) != (str(path), number):
                        raise InputError(
                            f"{path}:{number}: expected the file that was scanned, found another row; scan anew"
                        )
                    # The last line of a file may lack its end, and the next file goes on behind it.
                    cut = path != data.files[-1] and not line.endswith(b"\n")
                    (hold if row.suspect else keep).write(line + b"\n" * cut)
    return kept, held_back
