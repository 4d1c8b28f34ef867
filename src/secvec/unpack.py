"""Read the bytes of a data file, unpacked where it is gzip or zstd; no torch."""

import gzip
import io
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from secvec.datafiles import regular, unreadable
from secvec.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER_BYTES = 1 << 18
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# Texts shrink to a tenth, very repetitive ones to a fiftieth; a small file is never a danger to memory.
_BOMB_BYTES = 1 << 28
_BOMB_RATIO = 200


def opened(path: Path) -> BinaryIO:
    """Open a data file for reading its bytes unpacked; whether it is packed is told by its first bytes.

    Raises InputError, now or when it is read, on a file that cannot be read, is cut short or is a compression bomb;
    MissingExtraError when zstd is needed and pyarrow is not installed.
    """
    regular(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        magic = file.read(len(_ZSTD))
        file.seek(0)
        unpack = next((unpack for start, unpack in _UNPACKERS.items() if magic.startswith(start)), None)
        stream = file if unpack is None else unpack(file)
    except OSError as error:
        file.close()
        raise unreadable(path, error) from error
    except MissingExtraError:
        file.close()
        raise
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path, file, stream), _BUFFER_BYTES))


def refuse_bomb(path: Path, unpacked_bytes: int, packed_bytes: int) -> None:
    """Raise InputError when a file holds far more than texts of its size ever do."""
    if unpacked_bytes > _BOMB_BYTES and unpacked_bytes > _BOMB_RATIO * packed_bytes:
        raise InputError(
            f"{path}: expected packed texts, found more than {unpacked_bytes // packed_bytes:,} times its own size: a "
            "compression bomb; unpack it yourself if you trust it"
        )


class _Unpacked(io.RawIOBase):
    """The bytes of a file as they are read; says in our words what is wrong with them."""

    def __init__(self, path: Path, file: BinaryIO, stream: BinaryIO) -> None:
        self._path, self._file, self._stream = path, file, stream
        self._packed_bytes, self._unpacked_bytes = path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        try:
            piece = self._stream.read(len(view))
        except (OSError, EOFError, zlib.error) as error:
            raise self._broken(error) from error
        self._unpacked_bytes += len(piece)
        refuse_bomb(self._path, self._unpacked_bytes, self._packed_bytes)
        view[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _broken(self, error: Exception) -> InputError:
        if self._stream is self._file:
            return unreadable(self._path, error)
        return InputError(f"{self._path}: expected packed data, whole and sound, found: {error}; fetch it again")


def _gzip(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _zstd(file: BinaryIO) -> BinaryIO:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))


_UNPACKERS: Mapping[bytes, Callable[[BinaryIO], BinaryIO]] = {_GZIP: _gzip, _ZSTD: _zstd}
