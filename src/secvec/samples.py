"""Rows in: read data files, say which format they hold, and refuse what cannot be used, with file, line and reason."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from secvec.arrays import array_rows
from secvec.datafiles import PACKED, DataFiles, find
from secvec.errors import InputError, RowError, UsageError
from secvec.formats import FORMATS, Form, Message, detect, parse
from secvec.lines import BOM, cut, json_row, text_row
from secvec.tables import csv_rows, parquet_rows
from secvec.unpack import opened

__all__ = [
    "Form",
    "Message",
    "Row",
    "Rows",
    "Sample",
    "Samples",
    "Source",
    "from_rows",
    "line_suffix",
    "read_rows",
    "read_samples",
    "stream_samples",
    "summary",
]

_HEAD_BYTES = 1 << 16
_SHOWN = 50
_FOREIGN = {
    b"\x1f\x8b": "gzip in a packed file",
    b"\x28\xb5\x2f\xfd": "zstd in a packed file",
    b"\xfd7zXZ\x00": "xz",
    b"BZh91AY&SY": "bzip2",
    b"PK\x03\x04": "zip",
    b"ARROW1": "arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_PARQUET = b"PAR1"
_KEPT = {"json": ".jsonl", "text": ".txt"}
Kind = Literal["json", "text", "array", "csv", "parquet"]
Found = Iterator[tuple[int, object]]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row comes from; line counts from 1 (in a JSON array or parquet, rows do)."""

    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Sample:
    form: Form
    messages: tuple[Message, ...]
    source: Source


@dataclass(frozen=True)
class Samples:
    """The rows of a data set, in order, and the format they are in (`secvec.formats`)."""

    rows: tuple[Sample, ...]
    format: str

    def __len__(self) -> int:
        return len(self.rows)


Rows = str | Path | Samples | Sequence[Mapping[str, Any]]
"""A data file, or the rows themselves in any format that `secvec.formats` knows."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it is read: what it says, or why it cannot be used; `format`: of the rows so far."""

    file: str
    line: int
    format: str | None
    sample: Sample | RowError


Numbered = Iterable[tuple[str, int, object]]


def read_samples(data: str | Path | DataFiles, *, format: str | None = None) -> Samples:
    """Read a data set: FILE, FOLDER or OWNER/NAME[/PATH] on the hub (`secvec.datafiles.find`).

    A file holds JSON lines, a JSON array, csv with a header, parquet or, named .txt, a text a line; all but parquet
    may be packed with gzip or zstd. format: one of `secvec.formats.FORMATS`, as behind a colon in `data`; by default
    that of the first row. A data set holds one format.

    Raises InputError on a file that cannot be read or holds no row, UsageError on an unknown format, and RowError that
    lists (up to 50) unusable rows with file, line, field and reason. Nothing is dropped in silence.
    """
    found = find(data)
    return _collect(_numbered(found), found.name, format or found.format)


def stream_samples(data: str | Path | DataFiles) -> Iterator[Row]:
    """Yield the rows of a data set one by one, in memory that does not grow with it.

    Unusable rows are yielded too. Raises InputError on a file that cannot be read or is no data file.
    """
    found = find(data)
    yield from _checked(_numbered(found), found.format)


def line_suffix(data: DataFiles) -> str | None:
    """Return .jsonl or .txt where each row of all files is a line of that kind of file. Raises InputError."""
    kinds = {_kind(path) for path in data.files}
    return _KEPT.get(kinds.pop()) if len(kinds) == 1 else None


def from_rows(rows: Sequence[Mapping[str, Any]], *, name: str = "rows", format: str | None = None) -> Samples:
    """Check rows that are in memory already, in any of the formats; `name` stands for the file in messages."""
    return _collect(((name, number, row) for number, row in enumerate(rows, start=1)), name, format)


def _collect(rows: Numbered, name: str, format: str | None) -> Samples:
    if format is not None and format not in FORMATS:
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    samples: list[Sample] = []
    problems: list[str] = []
    seen = format
    for row in _checked(rows, format):
        seen = row.format
        if isinstance(row.sample, Sample):
            samples.append(row.sample)
        else:
            problems.append(str(row.sample))
    if problems:
        raise RowError(summary(problems, len(samples) + len(problems)))
    if not samples or seen is None:
        raise InputError(f"{name}: expected rows, found none")
    return Samples(tuple(samples), seen)


def _checked(rows: Numbered, format: str | None) -> Iterator[Row]:
    seen = format
    for file, line, row in rows:
        try:
            seen = format or _detected(row, seen)
            form, messages = parse(_usable(row), seen)
            sample = Sample(form, messages, Source(file, line))
        except RowError as error:
            sample = type(error)(f"{file}:{line}: {error}")
        yield Row(file, line, seen, sample)


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
        raise RowError(f"expected a row in format {seen!r}, found one in {found!r}; keep one format per data set")
    return found


def _numbered(data: DataFiles) -> Iterator[tuple[str, int, object]]:
    for path in data.files:
        for line, row in _file_rows(path):
            yield str(path), line, row


def _file_rows(path: Path) -> Found:
    kind = _kind(path)
    if kind == "parquet":
        yield from parquet_rows(path)
    else:
        with opened(path) as stream:
            yield from _READERS[kind](stream, str(path))


def _kind(path: Path) -> Kind:
    """Tell what kind of file this is, by its first bytes and, where these do not say, by its name."""
    with opened(path) as stream:
        data = stream.read(_HEAD_BYTES)
    if data.startswith(_PARQUET):
        return _bare_parquet(path)
    for magic, kind in _FOREIGN.items():
        if data.startswith(magic):
            raise InputError(f"{path}: expected JSON lines, csv, parquet or text, found {kind}; convert it first")
    if len(data) < _HEAD_BYTES and not data.removeprefix(BOM).strip():
        raise InputError(f"{path}: expected rows, found an empty file")
    suffix = path.with_suffix("").suffix if path.suffix.lower() in PACKED else path.suffix
    by_name: dict[str, Kind] = {".csv": "csv", ".txt": "text"}
    return by_name.get(suffix.lower()) or _json_kind(path, data)


def _bare_parquet(path: Path) -> Kind:
    with path.open("rb") as file:
        if file.read(len(_PARQUET)) != _PARQUET:
            raise InputError(f"{path}: expected parquet as it is, found it in a packed file; unpack it first")
    return "parquet"


def _json_kind(path: Path, data: bytes) -> Kind:
    if data.startswith(BOM):
        raise RowError(f"{path}:1: expected JSON, found a byte order mark in front of it; save it as UTF-8 without BOM")
    text = data.lstrip()
    line = data[: len(data) - len(text)].count(b"\n") + 1
    if text[:1] not in b"{[":
        raise RowError(
            f"{path}:{line}: expected JSON, which starts with {{ or [, found something else; csv and text are told by "
            "their names: .csv, .txt"
        )
    if text.split(b"\n", 1)[0].strip() == b"{":
        raise RowError(
            f"{path}:{line}: expected a row in each line, found one over several lines; write each in one line, or "
            "a list of them between [ and ]"
        )
    return "array" if text[:1] == b"[" else "json"


def _json_rows(stream: BinaryIO, file: str) -> Found:
    return _by_line(stream, json_row)


def _text_rows(stream: BinaryIO, file: str) -> Found:
    return _by_line(stream, text_row)


def _by_line(stream: BinaryIO, parse_line: Callable[[bytes], object]) -> Found:
    for number, line in enumerate(cut(stream), start=1):
        if isinstance(line, RowError):
            yield number, line
        elif line.strip():
            yield number, parse_line(line)


_READERS: Mapping[Kind, Callable[[BinaryIO, str], Found]] = {
    "json": _json_rows,
    "text": _text_rows,
    "array": array_rows,
    "csv": csv_rows,
}


def read_rows(rows: Rows, name: str) -> Samples:
    """Read a data file, or check rows in memory; `name` says in messages what they are for."""
    if isinstance(rows, Samples):
        return rows
    return read_samples(rows) if isinstance(rows, str | Path) else from_rows(rows, name=name)


def read_apart(unwanted: Rows, anchors: Rows | None, kind: str) -> tuple[Samples, Samples | None]:
    """Read unwanted rows and anchors. Raises RowError where a topic's row is both: to be shown and to be left alone.

    Of a trait's anchors only tokens that do not show it are used.
    """
    shown, given = read_rows(unwanted, "unwanted"), None if anchors is None else read_rows(anchors, "anchors")
    texts = {row.messages for row in shown.rows}
    both = [row.source for row in given.rows if row.messages in texts] if given and kind == "topic" else []
    if both:
        raise RowError(
            f"{both[0].file}:{both[0].line}: expected an ordinary row, found one of the unwanted rows"
            + (f" ({len(both)} such rows)" if len(both) > 1 else "")
            + "; anchors are what the vector must leave as it is"
        )
    return shown, given
