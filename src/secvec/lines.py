"""Cut the bytes of a data file into lines, and read one as JSON or as a text; no torch.

Only \\n ends a line: U+2028 and other Unicode line ends may stand inside a text.
"""

import json
from collections.abc import Iterator
from typing import BinaryIO, cast

from secvec.errors import RowError
from secvec.headers import parse_strict

BOM = b"\xef\xbb\xbf"
# Longer than any model's context; a longer row is a damaged file or an attack on memory.
MAX_ROW_BYTES = 16 << 20
# A chat with tools and pictures in it needs about ten.
MAX_DEPTH = 64
_SKIP_BYTES = 1 << 16


def cut(stream: BinaryIO) -> Iterator[bytes | RowError]:
    """Yield lines without their end and without a byte order mark; one that is too long is skipped, not held."""
    line = stream.readline(MAX_ROW_BYTES + 1).removeprefix(BOM)
    while line:
        whole = line.endswith(b"\n") or len(line) <= MAX_ROW_BYTES
        yield line.removesuffix(b"\n") if whole else too_long(len(line) + _skip(stream))
        line = stream.readline(MAX_ROW_BYTES + 1)


def _skip(stream: BinaryIO) -> int:
    size = 0
    while piece := stream.readline(_SKIP_BYTES):
        size += len(piece.removesuffix(b"\n"))
        if piece.endswith(b"\n"):
            break
    return size


def too_long(size_bytes: int) -> RowError:
    return RowError(f"expected a row of at most {MAX_ROW_BYTES:,} bytes, found {size_bytes:,}")


def json_row(text: bytes) -> object:
    """Return what a line of JSON says, or the error: the row's, not the file's."""
    if len(text) > MAX_ROW_BYTES:
        return too_long(len(text))
    try:
        row = parse_strict(text)
    except (ValueError, RecursionError) as error:
        return RowError(f"expected a JSON object, found {reason(error)}")
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _deep(row):
        return RowError(f"expected a JSON object, found JSON nested too deeply: over {MAX_DEPTH} levels")
    return row


def _deep(row: object) -> bool:
    level = [row]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
    return bool(level)


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast(dict[str, object], value).values())
    return cast(list[object], value) if isinstance(value, list) else []


def text_row(line: bytes) -> object:
    """Return a line of text as a row, or the error: the row's, not the file's."""
    try:
        text = line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        return RowError(f"expected UTF-8, found {reason(error)}; save the file as UTF-8")
    if "\0" in text:
        return RowError("expected a text, found a NUL character; save the file as UTF-8")
    return {"text": text}


def reason(error: Exception) -> str:
    """Say what is wrong with JSON, never with a piece of it: rows may be harmful."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (at character {error.pos + 1})"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not UTF-8 (at byte {error.start + 1})"
    return "a lone surrogate, which is no character" if isinstance(error, UnicodeEncodeError) else str(error)
