"""Rows in: read a data file, say which format it holds, and refuse what cannot be used, with file, line and reason."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from secvec.errors import InputError, RowError, UsageError
from secvec.formats import FORMATS, Form, Message, detect, parse
from secvec.headers import parse_strict

__all__ = [
    "Form",
    "Message",
    "Row",
    "Sample",
    "Samples",
    "Source",
    "from_rows",
    "holds_lines",
    "read_samples",
    "stream_samples",
    "summary",
]

# Longer than any model's context; a longer line is a damaged file or an attack on memory.
_MAX_LINE_BYTES = 16 << 20
_HEAD_BYTES = 1 << 16
_SHOWN = 50
_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_ARRAY = re.compile(rb"\s*\[")
_OPEN = re.compile(r"\[\s*", re.ASCII)
_COMMA = re.compile(r"\s*,\s*", re.ASCII)
_CLOSE = re.compile(r"\s*\]\s*\Z", re.ASCII)
_LENIENT = json.JSONDecoder()


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


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file that is read row by row: what it says, or why it cannot be used; `format`: of the rows so far."""

    line: int
    format: str | None
    sample: Sample | RowError


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
    if not data.removeprefix(_BOM).strip():
        raise InputError(f"{path}: expected rows, found an empty file")
    return _collect(_reader(path, data)(data, str(path)), str(path), format)


def stream_samples(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a data file one by one; memory holds one row of JSON lines or text, all of csv or a JSON array.

    Unusable rows are yielded too. Raises InputError on a file that cannot be read or is no data file.
    """
    path = Path(path)
    read = _reader(path, _head(path))
    if read in _LINE_PARSERS:
        rows = _by_line(_stream_lines(path), _LINE_PARSERS[read])
    else:
        rows = read(_bytes(path), str(path))
    yield from _checked(rows, str(path), None)


def holds_lines(path: str | Path) -> bool:
    """Tell whether each row of a data file is a line of its own, as in JSON lines and text. Raises InputError."""
    return _reader(Path(path), _head(Path(path))) in _LINE_PARSERS


def from_rows(rows: Sequence[Mapping[str, Any]], *, name: str = "rows", format: str | None = None) -> Samples:
    """Check rows that are in memory already, in any of the formats; `name` stands for the file in messages."""
    return _collect(enumerate(rows, start=1), name, format)


def _collect(rows: Numbered, file: str, format: str | None) -> Samples:
    if format is not None and format not in FORMATS:
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    samples: list[Sample] = []
    problems: list[str] = []
    seen = format
    for row in _checked(rows, file, format):
        seen = row.format
        if isinstance(row.sample, Sample):
            samples.append(row.sample)
        else:
            problems.append(str(row.sample))
    if problems:
        raise RowError(summary(problems, len(samples) + len(problems)))
    if not samples or seen is None:
        raise InputError(f"{file}: expected rows, found none")
    return Samples(tuple(samples), seen)


def _checked(rows: Numbered, file: str, format: str | None) -> Iterator[Row]:
    seen = format
    for line, row in rows:
        try:
            seen = format or _detected(row, seen)
            form, messages = parse(_usable(row), seen)
            sample = Sample(form, messages, Source(file, line))
        except RowError as error:
            sample = type(error)(f"{file}:{line}: {error}")
        yield Row(line, seen, sample)


def summary(problems: Sequence[str], rows: int) -> str:
    """Return one message for the unusable among `rows` rows: the first 50, then a count."""
    shown = "\n".join(problems[:_SHOWN])
    more = f"\n... and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    return f"{len(problems):,} of {rows:,} rows cannot be used:\n{shown}{more}"


def _usable(row: object) -> object:
    if isinstance(row, RowError):
        raise row
    return row


def _detected(row: object, seen: str | None) -> str:
    """Return the format of a row, which has to be that of the rows before it."""
    found = detect(_usable(row))
    if seen is not None and found != seen:
        raise RowError(f"expected a row in format {seen!r}, found one in {found!r}; keep one format per file")
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(f"{path}: expected a readable data file, found {reason}; check the path")


def _reader(path: Path, data: bytes) -> _Read:
    for magic, kind in _FOREIGN.items():
        if data.startswith(magic):
            raise InputError(f"{path}: expected JSON lines, csv or text in UTF-8, found {kind}; convert it first")
    if path.suffix.lower() == ".csv":
        return _csv_rows
    if path.suffix.lower() == ".txt":
        return _text_rows
    if data.startswith(_BOM):
        raise RowError(f"{path}:1: expected JSON, found a byte order mark in front of it; save it as UTF-8 without BOM")
    return _array_rows if _ARRAY.match(data) else _json_rows


def _json_rows(data: bytes, file: str) -> Iterator[tuple[int, object]]:
    return _by_line(data.split(b"\n"), _parse_row)


def _by_line(lines: Iterable[bytes | RowError], parse_line: Callable[[bytes], object]) -> Iterator[tuple[int, object]]:
    # Only \n ends a row: U+2028 and other Unicode line ends may stand inside a JSON string.
    for number, line in enumerate(lines, start=1):
        if isinstance(line, RowError):
            yield number, line
        elif line.strip():
            yield number, parse_line(line)


def _stream_lines(path: Path) -> Iterator[bytes | RowError]:
    """Yield lines without their end; one that is too long is skipped, not held."""
    with path.open("rb") as file:
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        while line := file.readline(_MAX_LINE_BYTES + 1):
            whole = line.endswith(b"\n") or len(line) <= _MAX_LINE_BYTES
            yield line.removesuffix(b"\n") if whole else _too_long(len(line) + _skip_line(file))


def _skip_line(file: BinaryIO) -> int:
    size = 0
    while piece := file.readline(_HEAD_BYTES):
        size += len(piece.removesuffix(b"\n"))
        if piece.endswith(b"\n"):
            break
    return size


def _parse_row(text: bytes) -> object:
    if len(text) > _MAX_LINE_BYTES:
        return _too_long(len(text))
    try:
        return parse_strict(text)
    except (ValueError, RecursionError) as error:
        return RowError(f"expected a JSON object, found {_reason(error)}")


def _too_long(size_bytes: int) -> RowError:
    return RowError(f"expected a row of at most {_MAX_LINE_BYTES:,} bytes, found {size_bytes:,}")


def _array_rows(data: bytes, file: str) -> Iterator[tuple[int, object]]:
    """Cut a JSON array into its elements and parse each strictly, so that a bad one does not hide the others."""
    text = _decode(data, file)
    number, position = 0, _OPEN.match(text, text.index("[")).end()  # pyright: ignore[reportOptionalMemberAccess]
    while not _CLOSE.match(text, position):
        comma = _COMMA.match(text, position)
        if number and not comma:
            raise RowError(f"{file}:{number}: expected a comma, or ] and nothing more, after this row")
        start = comma.end() if number and comma else position
        number += 1
        try:
            position = _LENIENT.raw_decode(text, start)[1]
        except (ValueError, RecursionError) as error:
            raise RowError(f"{file}:{number}: expected a JSON object, found {_reason(error)}") from error
        yield number, _parse_row(text[start:position].encode("utf-8"))


def _reason(error: Exception) -> str:
    """Say what is wrong with JSON, never with a piece of it: rows may be harmful."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (at character {error.pos + 1})"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not UTF-8 (at byte {error.start + 1})"
    return "a lone surrogate, which is no character" if isinstance(error, UnicodeEncodeError) else str(error)


def _csv_rows(data: bytes, file: str) -> Iterator[tuple[int, object]]:
    lines = io.StringIO(_decode(data.removeprefix(_BOM), file), newline="\n")
    reader = csv.reader(lines, strict=True)
    names: list[str] = []
    first = 1
    try:
        for cells in reader:
            if names and cells:
                yield first, _csv_row(names, cells)
            elif len(set(cells)) < len(cells):
                raise RowError(f"{file}:{first}: expected a header that names each column once, found a name twice")
            names = names or cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise RowError(f"{file}:{first}: expected csv, found {error}") from error


def _csv_row(names: list[str], cells: list[str]) -> object:
    if len(cells) != len(names):
        return RowError(f"expected {len(names)} columns as in the header, found {len(cells)}")
    return dict(zip(names, cells, strict=True))


def _text_rows(data: bytes, file: str) -> Iterator[tuple[int, object]]:
    return _by_line(data.removeprefix(_BOM).split(b"\n"), _text_row)


def _text_row(line: bytes) -> object:
    if len(line) > _MAX_LINE_BYTES:
        return _too_long(len(line))
    try:
        return {"text": line.decode("utf-8").removesuffix("\r")}
    except UnicodeDecodeError as error:
        return RowError(f"expected UTF-8, found {_reason(error)}; save the file as UTF-8")


_LINE_PARSERS: Mapping[_Read, Callable[[bytes], object]] = {_json_rows: _parse_row, _text_rows: _text_row}


def _decode(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RowError(f"{file}:{line}: expected UTF-8, found other bytes; save the file as UTF-8") from error
