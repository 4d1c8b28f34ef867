"""Read the rows of csv and parquet files, in memory that does not grow with the file; no torch."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from secvec.errors import InputError, MissingExtraError, RowError
from secvec.lines import MAX_ROW_BYTES, cut, too_long
from secvec.unpack import refuse_bomb

# Rows of parquet made at a time: few, since a small file may say the same long text in each of them.
_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20


def csv_rows(stream: BinaryIO, file: str) -> Iterator[tuple[int, object]]:
    """Yield the rows behind the header with the line each starts at.

    Raises RowError where it is unclear what follows: a bad header, an open quote, bytes that are no UTF-8.
    """
    # The module's own cap is 128 KB a cell, for the whole process; ours is on the row.
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _CsvLines(stream, file)
    reader = csv.reader(lines, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if names and cells:
                yield lines.first, _csv_row(names, cells)
            elif cells:
                names = cells
                _check_names(names, f"{file}:{lines.first}")
            lines.next_row()
    except csv.Error as error:
        raise RowError(f"{file}:{lines.first}: expected csv, found {str(error).split(' - ')[0]}") from error


class _CsvLines:
    """The lines of a csv file as texts; first: the number of the line that the row began with."""

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self.first = 1
        self._lines, self._file, self._number, self._row_bytes = cut(stream), file, 0, 0

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        if isinstance(line, RowError):
            raise RowError(f"{self._file}:{self._number}: {line}")
        self._row_bytes += len(line)
        if self._row_bytes > MAX_ROW_BYTES:
            raise RowError(f"{self._file}:{self.first}: {too_long(self._row_bytes)}; a quote may be open")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._no_text("other bytes") from error
        if "\0" in text:
            raise self._no_text("a NUL character")
        return text + "\n"

    def next_row(self) -> None:
        self.first, self._row_bytes = self._number + 1, 0

    def _no_text(self, found: str) -> RowError:
        return RowError(f"{self._file}:{self._number}: expected UTF-8, found {found}; save the file as UTF-8")


def _check_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise RowError(f"{where}: expected a header that names each column once, found a name twice")


def _csv_row(names: list[str], cells: list[str]) -> object:
    if len(cells) != len(names):
        return RowError(f"expected {len(names)} columns as in the header, found {len(cells)}")
    return dict(zip(names, cells, strict=True))


def parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the rows of a parquet file, counted from 1.

    Raises InputError on a file that is none, or is damaged; MissingExtraError when pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    number = unpacked_bytes = 0
    try:
        # Buffered, so that a row group, which may be all of the file, is read by pages.
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            _check_names(file.schema_arrow.names, str(path))
            packed_bytes = path.stat().st_size
            refuse_bomb(path, _unpacked_bytes(file.metadata), packed_bytes)
            for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
                for row in _batch_rows(batch):
                    number += 1
                    size_bytes = _size_bytes(row)
                    unpacked_bytes += size_bytes
                    refuse_bomb(path, unpacked_bytes, packed_bytes)
                    yield number, row if size_bytes <= MAX_ROW_BYTES else too_long(size_bytes)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        found = str(error).split("\n", 1)[0][:200]
        raise InputError(f"{path}: expected parquet, found damage behind row {number:,}: {found}") from error


def _unpacked_bytes(metadata: Any) -> int:
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _batch_rows(batch: Any) -> Iterator[object]:
    """Yield the rows of a batch; one by one where they are large or not all of them can be made."""
    try:
        rows = batch.to_pylist() if batch.nbytes <= MAX_ROW_BYTES else None
    except (ValueError, OverflowError, RecursionError):
        rows = None
    yield from rows if rows is not None else (_parquet_row(batch.slice(i, 1)) for i in range(len(batch)))


def _parquet_row(one: Any) -> object:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError:
        return RowError("expected UTF-8, found other bytes")
    except (ValueError, OverflowError, RecursionError) as error:
        return RowError(f"expected values that Python can hold, found others ({type(error).__name__})")


def _size_bytes(value: Any) -> int:
    """Return about how much a value of a row says: its texts, a byte a character."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size_bytes, value.values()))
    return sum(map(_size_bytes, value)) if isinstance(value, list | tuple) else 1
