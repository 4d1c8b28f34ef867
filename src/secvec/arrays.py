"""Cut a JSON array into its elements as it is read, so that a bad one does not hide the others; no torch."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from secvec.errors import RowError
from secvec.lines import MAX_ROW_BYTES, json_row, reason

_PIECE_BYTES = 1 << 18
_SPACE = re.compile(r"[ \t\n\r]*")
_LENIENT = json.JSONDecoder()


def array_rows(stream: BinaryIO, file: str) -> Iterator[tuple[int, object]]:
    """Yield the elements of a JSON array with their numbers; memory holds one of them, and a piece of the file.

    Raises RowError where the array itself is broken: what follows cannot be told apart any more.
    """
    text = _Text(stream, file)
    text.skip("[")
    while text.next() != "]":
        if text.number:
            text.skip(",")
        text.number += 1
        yield text.number, json_row(text.element().encode("utf-8"))
    text.skip("]")
    if text.next():
        raise text.broken()


class _Text:
    """The text from a place in the file on, as much of it as was read; number: of the element that is read."""

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self.number = 0
        self._stream, self._file, self._text, self._at = stream, file, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = self._no_utf8 = False

    def next(self) -> str:
        """Move to the next character that is no space and return it; at the end of the file return nothing."""
        self._at = self._pass_space(self._at)
        while self._at == len(self._text) and not self._ended:
            self._read(_PIECE_BYTES)
            self._at = self._pass_space(self._at)
        return self._text[self._at : self._at + 1]

    def skip(self, character: str) -> None:
        if self.next() != character:
            raise self.broken()
        self._at += 1

    def element(self) -> str:
        """Return the text of the next element, reading on, twice as much each time, until it is all there."""
        self.next()
        while True:
            held = len(self._text) - self._at
            try:
                end = _LENIENT.raw_decode(self._text, self._at)[1]
            except (ValueError, RecursionError) as error:
                if self._ended or held > MAX_ROW_BYTES or isinstance(error, RecursionError):
                    raise self._unreadable(error) from error
            else:
                # What follows shows that the element is whole: 12 may go on as 123.
                if self._ended or self._pass_space(end) < len(self._text):
                    found, self._at = self._text[self._at : end], end
                    return found
            self._read(max(_PIECE_BYTES, held))

    def broken(self) -> RowError:
        return RowError(f"{self._where()}: expected a comma, or ] and nothing more, after this row")

    def _unreadable(self, error: Exception) -> RowError:
        """Say it with the place inside the row, not inside the piece of the file that happens to be read."""
        found = reason(error)
        if isinstance(error, json.JSONDecodeError):
            found = f"broken JSON: {error.msg} (at character {error.pos - self._at + 1})"
        cap = "" if self._ended else f" of at most {MAX_ROW_BYTES:,} bytes"
        return RowError(f"{self._where()}: expected a JSON object{cap}, found {found}")

    def _pass_space(self, start: int) -> int:
        return _SPACE.match(self._text, start).end()  # pyright: ignore[reportOptionalMemberAccess]

    def _read(self, size_bytes: int) -> None:
        if self._no_utf8:
            raise RowError(f"{self._where()}: expected UTF-8, found other bytes; save the file as UTF-8")
        data = self._stream.read(size_bytes)
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            # The rows in front of these bytes are read first, so that it is known which row holds them.
            text = error.object[: error.start].decode("utf-8")
            self._no_utf8, self._ended = True, False
        self._text, self._at = self._text[self._at :] + text, 0

    def _where(self) -> str:
        return f"{self._file}:{max(self.number, 1)}"
