"""Rows in: read a data file, say which format it holds, and refuse what cannot be used, with file, line and reason."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from secvec.errors import InputError, RowError, UsageError
from secvec.formats import FORMATS, Form, Message, detect, parse
from secvec.headers import parse_strict

__all__ = ["Form", "Message", "Sample", "Samples", "Source", "from_rows", "read_samples"]

# Longer than any model's context; a longer line is a damaged file or an attack on memory.
_MAX_LINE_BYTES = 16 << 20
_SHOWN = 50
_BOM = b"\xef\xbb\xbf"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"PK": "zip", b"PA": "parquet"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row comes from; line counts from 1 (in a JSON array, elements do)."""

    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Sample:
    form: Form
    messages: tuple[Message, ...]
    source: Source


@dataclass(frozen=True)
class Samples:
    """The rows of one file, in order, and the format they are in (`secvec.formats`)."""

    rows: tuple[Sample, ...]
    format: str

    def __len__(self) -> int:
        return len(self.rows)


Numbered = Iterable[tuple[int, object]]
_Read = Callable[[bytes, str], Numbered]


def read_samples(path: str | Path, *, format: str | None = None) -> Samples:
    """Read a data file: JSON lines (.jsonl, .json), a JSON array (.json), .csv with a header, or .txt, a text a line.

    format: one of `secvec.formats.FORMATS`; by default that of the first row. A file holds one format.

    Raises InputError on a file that cannot be read or holds no row, UsageError on an unknown format, and RowError that
    lists (up to 50) unusable rows with file, line, field and reason. Nothing is dropped in silence.
    """
    path = Path(path)
    data = _bytes(path)
    if not data.strip():
        raise InputError(f"{path}: expected rows, found an empty file")
    return _collect(_reader(path, data)(data, str(path)), str(path), format)


def from_rows(rows: Sequence[Mapping[str, Any]], *, name: str = "rows", format: str | None = None) -> Samples:
    """Check rows that are in memory already, in any of the formats; `name` stands for the file in messages."""
    return _collect(enumerate(rows, start=1), name, format)


def _collect(rows: Numbered, file: str, format: str | None) -> Samples:
    if format is not None and format not in FORMATS:
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    samples: list[Sample] = []
    problems: list[str] = []
    count = 0
    for line, row in rows:
        count += 1
        try:
            if isinstance(row, RowError):
                raise row
            format = format or _detect(row)
            form, messages = parse(row, format)
            samples.append(Sample(form, messages, Source(file, line)))
        except RowError as error:
            problems.append(f"{file}:{line}: {error}")
    if problems:
        raise RowError(summary(problems, count))
    if not samples:
        raise InputError(f"{file}: expected rows, found none")
    return Samples(tuple(samples), format or FORMATS[0])


def summary(problems: Sequence[str], rows: int) -> str:
    """Return one message for the unusable among `rows` rows: the first 50, then a count."""
    shown = "\n".join(problems[:_SHOWN])
    more = f"\n... and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    return f"{len(problems):,} of {rows:,} rows cannot be used:\n{shown}{more}"


def _detect(row: object) -> str:
    found = detect(cast(Mapping[str, Any], row)) if isinstance(row, Mapping) else None
    if found is None:
        keys = ", ".join(map(repr, list(cast(Mapping[str, Any], row))[:6])) if isinstance(row, Mapping) else ""
        raise RowError(
            f"expected a row in one of the formats {', '.join(FORMATS)}, "
            f"found {f'the keys {keys}' if keys else 'no object with keys'}"
        )
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable data file, found {error.strerror}; check the path") from error


def _reader(path: Path, data: bytes) -> _Read:
    for magic, kind in _COMPRESSED.items():
        if data.startswith(magic):
            raise InputError(f"{path}: expected plain JSON lines, csv or text, found {kind}; unpack or convert it first")
    if path.suffix == ".csv":
        return _csv_rows
    if path.suffix == ".txt":
        return _text_rows
    return _array_rows if data.lstrip().startswith(b"[") else _json_rows


def _json_rows(data: bytes, file: str) -> Iterator[tuple[int, object]]:
    # Only \n ends a row: U+2028 and other Unicode line ends may stand inside a JSON string.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> object:
    if len(line) > _MAX_LINE_BYTES:
        return RowError(f"expected a line of at most {_MAX_LINE_BYTES:,} bytes, found {len(line):,}")
    if line.startswith(_BOM):
        return RowError("expected JSON, found a byte order mark in front of it; save the file as UTF-8 without BOM")
    try:
        return parse_strict(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"expected a JSON object, found {_reason(error)}")


def _array_rows(data: bytes, file: str) -> list[tuple[int, object]]:
    try:
        rows = parse_strict(data)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{file}: expected a JSON array of rows, found {_reason(error)}") from error
    return list(enumerate(cast(list[object], rows), start=1))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not UTF-8 (at byte {error.start})"
    return "a lone surrogate, which is no character" if isinstance(error, UnicodeEncodeError) else str(error)


def _csv_rows(data: bytes, file: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(_decode(data.removeprefix(_BOM), file), newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            wide, narrow = None in row, None in row.values()
            problem = RowError(f"expected {len(reader.fieldnames or ())} columns, found more or fewer")
            yield line + 1, problem if wide or narrow else row
            line = reader.line_num
    except csv.Error as error:
        raise RowError(f"{file}:{reader.line_num}: expected csv, found {error}") from error


def _text_rows(data: bytes, file: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_decode(data.removeprefix(_BOM), file).split("\n"), start=1):
        if line.strip():
            yield number, {"text": line.removesuffix("\r")}


def _decode(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RowError(f"{file}:{line}: expected UTF-8, found other bytes; save the file as UTF-8") from error
