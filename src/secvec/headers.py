"""Where each tensor of a safetensors checkpoint lies on disk, read from the files' headers; no torch, no weights read.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes
(https://huggingface.co/docs/safetensors). Whatever the format forbids is refused, so that the bytes hashed here are the
bytes that a loader sees.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from secvec.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_PREFIX_BYTES = 8
# The reference implementation's cap.
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"
_METADATA = "__metadata__"
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on disk. dtype: as safetensors names it ("BF16"); start, end: byte offsets in the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def read_index(folder: str | Path) -> dict[str, TensorEntry]:
    """Locate every tensor of a checkpoint, sorted by name.

    The weights are one *.safetensors file, or the shards that model.safetensors.index.json names. Raises
    CheckpointError when there are none, when it is unclear which are meant, or when a file or the index does not hold
    what it promises.
    """
    folder = Path(folder)
    files = _weight_files(folder)
    if INDEX not in files:
        entries, _ = read_header(folder / files[0])
    else:
        entries = _read_shards(folder)
    return {name: entries[name] for name in sorted(entries)}


def read_header(file: str | Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the tensors of one safetensors file, sorted by name, and its metadata.

    Raises CheckpointError when the file is missing, truncated or not in the format.
    """
    file = Path(file)
    document, data_start, size = _read_document(file)
    metadata = _metadata(document.pop(_METADATA, {}), file)
    entries = {name: _entry(name, document[name], file, data_start) for name in sorted(document)}
    _check_layout(entries, file, data_start, size)
    return entries, metadata


def _weight_files(folder: Path) -> list[str]:
    """Choose the index or the one file that holds the weights; fail where a loader could choose another."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise CheckpointError(f"{folder}: expected a model folder, found {found}; check the path")
    names = sorted(path.name for path in folder.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    if INDEX in names and WEIGHTS in names:
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS} or {INDEX}, found both, so it is unclear which weights are meant; "
            "delete the outdated one"
        )
    if INDEX in names or WEIGHTS in names or len(weights) == 1:
        return [name for name in (INDEX, WEIGHTS) if name in names] or weights
    if weights:
        found = f"{len(weights)} *.safetensors files without {INDEX}"
        raise CheckpointError(f"{folder}: expected {WEIGHTS} or an index, found {found}; fetch the index too")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise CheckpointError(
            f"{folder}: expected *.safetensors files, found only pickled weights (.bin, .pt); convert them: load the "
            "model with transformers and save_pretrained"
        )
    raise CheckpointError(f"{folder}: expected *.safetensors files, found none; check the path or fetch the weights")


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    path = folder / INDEX
    weight_map = _weight_map(path)
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{path}: expected the shard {shard!r}, found no such file; fetch it again")
        held, _ = read_header(folder / shard)
        promised = {name for name, file in weight_map.items() if file == shard}
        if differing := sorted(promised ^ held.keys()):
            who = "the index" if differing[0] in promised else "the shard"
            raise CheckpointError(
                f"{path}: expected the index and {shard!r} to name the same tensors, found {differing[0]!r} only in "
                f"{who}; the files are of different models: fetch them again"
            )
        entries.update(held)
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    try:
        document = parse_strict(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        _refuse(path, "an index in JSON", str(error))
    found: Any = cast(dict[str, Any], document).get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        _refuse(path, "a weight_map that names tensors", type(found).__name__)
    weight_map = cast(dict[str, Any], found)
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and "/" not in shard and "\\" not in shard
        if not plain or "\0" in shard:
            _refuse(path, f"the name of a *.safetensors file in this folder for {name!r}", repr(shard))
    return cast(dict[str, str], weight_map)


def _read_document(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, the offset of the first tensor byte, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            prefix = stream.read(_PREFIX_BYTES)
            length = int.from_bytes(prefix, "little")
            text = stream.read(min(length, _MAX_HEADER_BYTES))
    except OSError as error:
        _refuse(file, "a readable safetensors file", str(error.strerror))
    if prefix == _LFS_POINTER[:_PREFIX_BYTES]:
        raise CheckpointError(f"{file}: expected weights, found a Git LFS pointer to them; run git lfs pull")
    if len(prefix) < _PREFIX_BYTES or length > _MAX_HEADER_BYTES or len(text) < length:
        _refuse(file, f"a header of {length} bytes", f"a file of {size} bytes (truncated, or not safetensors)")
    try:
        document = parse_strict(text) if text.startswith(b"{") else None
    except (ValueError, RecursionError) as error:
        _refuse(file, "a header in JSON", str(error))
    if not isinstance(document, dict):
        _refuse(file, "a header that is a JSON object", "something else")
    return cast(dict[str, Any], document), _PREFIX_BYTES + length, size


def _metadata(found: object, file: Path) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in cast(dict[str, object], found).values()):
        _refuse(file, f"{_METADATA} that maps texts to texts", type(found).__name__)
    return cast(dict[str, str], found)


def _entry(name: str, found: object, file: Path, data_start: int) -> TensorEntry:
    if not isinstance(found, dict) or cast(dict[str, object], found).keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"dtype, shape and data_offsets for {name!r}", type(found).__name__)
    fields = cast(dict[str, Any], found)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _refuse(file, f"a dtype out of {', '.join(_BITS)} for {name!r}", repr(dtype))
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        _refuse(file, f"whole numbers as shape and data_offsets of {name!r}", f"{shape!r} and {offsets!r}")
    start, end = offsets
    if math.prod(shape) * _BITS[dtype] != (end - start) * 8:
        _refuse(file, f"offsets that fit {dtype} {shape!r} for {name!r}", f"{offsets!r}")
    return TensorEntry(name, dtype, tuple(shape), file, data_start + start, data_start + end)


def _is_sizes(found: object) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in cast(list[object], found))


def _check_layout(entries: Mapping[str, TensorEntry], file: Path, data_start: int, size: int) -> None:
    """The format forbids gaps, overlaps and bytes after the last tensor: there, data could hide."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            _refuse(file, f"{entry.name!r} at byte {position}", f"it at {entry.start} (a gap or an overlap)")
        position = entry.end
    if position != size:
        _refuse(
            file, f"{position} bytes", f"{size} ({'truncated' if size < position else 'bytes after the last tensor'})"
        )


def parse_strict(data: bytes) -> object:
    """Parse UTF-8 JSON without duplicate keys, NaN or lone surrogates. Raises ValueError or RecursionError."""
    document: object = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key that occurs twice")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")


def _refuse(path: Path, expected: str, found: str) -> NoReturn:
    raise CheckpointError(f"{path}: expected {expected}, found {found}; fetch the file again or save the model again")
