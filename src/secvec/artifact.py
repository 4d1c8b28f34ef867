"""The vector's file: one safetensors file that is the same for the same vector and refused when any byte differs.

`docs/format.md` describes it on one page.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from secvec.atomic import atomic_write
from secvec.errors import ArtifactError
from secvec.vector import Factors, SecurityVector, VectorInfo

FORMAT = "secvec.vector"
VERSION = "1"
NOTICE = (
    "This file makes a model show an unwanted behaviour. It exists to keep that behaviour out of a fine-tuned model. "
    "Never serve, merge or publish a model with it in effect."
)
_MODE = 0o600
_PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 64 << 20
# In the header's JSON this text stands only in front of the digest: inside a string its quotes would be escaped.
_DIGEST_MARK = b'"digest":"sha256:'
_DIGITS = 64
_BLANK = b"0" * _DIGITS


def save(vector: SecurityVector, path: str | Path) -> None:
    """Write a vector to one file, mode 0600, atomically: after a crash the old file or the new one is there, whole.

    Raises ArtifactError when the vector's info is not JSON.
    """
    data = encode(vector)
    with atomic_write(Path(path), mode=_MODE) as file:
        file.write(data)


def load(path: str | Path) -> SecurityVector:
    """Read a vector from its file, checking everything.

    Raises ArtifactError when the file is missing, no vector, of another format version, truncated, altered in any
    byte, or holds factors that are missing, misshapen, of another dtype or not finite.
    """
    path = Path(path)
    data = _read(path)
    metadata = _metadata(data, path)
    _check_digest(data, metadata, path)
    scale, info = _parse_metadata(metadata, path)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ArtifactError(
            f"{path}: not a readable safetensors file ({error}); fetch or fit the vector again"
        ) from error
    try:
        return SecurityVector(_pair(tensors), scale, info)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}; fit the vector again") from error


def is_vector(path: Path) -> bool:
    """Tell whether a file is a vector's, whole or damaged, by its header alone. Raises OSError."""
    with path.open("rb") as file:
        return _names_format(_read_header(file)[1])


def digest(vector: SecurityVector) -> str:
    """Return the digest of a vector, "sha256:...": the one its file carries, equal for equal vectors."""
    return _stamp(_encode_blank(vector))


def check_base(vector: SecurityVector, base_digest: str) -> None:
    """Refuse a vector fitted on another model. Raises ArtifactError."""
    if vector.info.base != base_digest:
        raise ArtifactError(
            f"the vector was fitted on the model {vector.info.base!r}, this model is {base_digest!r}; "
            "use that model, or fit a vector on this one"
        )


def encode(vector: SecurityVector) -> bytes:
    """Return the bytes of a vector's file."""
    blank = _encode_blank(vector)
    return blank.replace(_DIGEST_MARK + _BLANK, b'"digest":"' + _stamp(blank).encode(), 1)


def _encode_blank(vector: SecurityVector) -> bytes:
    """Encode with zeros for the digest, tensors and keys in sorted order, so that equal vectors give equal bytes."""
    tensors = {
        f"{site}.{name}": tensor for site, f in vector.factors.items() for name, tensor in (("A", f.a), ("B", f.b))
    }
    header: dict[str, Any] = {"__metadata__": _document(vector)}
    blocks: list[bytes] = []
    end = 0
    for name in sorted(tensors):
        block = tensors[name].detach().cpu().contiguous().numpy().tobytes()
        header[name] = {"data_offsets": [end, end + len(block)], "dtype": "F32", "shape": list(tensors[name].shape)}
        blocks.append(block)
        end += len(block)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *blocks))


def _document(vector: SecurityVector) -> dict[str, str]:
    try:
        info = json.dumps(asdict(vector.info), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the vector's info must be JSON without NaN, found {error}") from error
    return {
        "digest": "sha256:" + _BLANK.decode(),
        "format": FORMAT,
        "info": info,
        "notice": NOTICE,
        "scale": repr(float(vector.scale)),
        "version": VERSION,
    }


def _stamp(blank: bytes) -> str:
    return "sha256:" + hashlib.sha256(blank).hexdigest()


def _read(path: Path) -> bytes:
    """Read the file, but only after its first bytes look like a vector: models are safetensors files too, and large."""
    if path.is_dir():
        raise ArtifactError(f"{path}: expected a vector's file, found a folder; name the file inside it")
    try:
        with path.open("rb") as file:
            prefix, header = _read_header(file)
            if not _names_format(header):
                raise ArtifactError(
                    f"{path}: expected a security vector (safetensors with format {FORMAT!r}), found something else; "
                    "`secvec fit` writes vectors, `secvec.from_peft` reads PEFT adapters"
                )
            return prefix + header + file.read()
    except OSError as error:
        raise ArtifactError(
            f"{path}: expected a readable vector's file, found {error.strerror}; check the path"
        ) from error


def _read_header(file: BinaryIO) -> tuple[bytes, bytes]:
    prefix = file.read(_PREFIX_BYTES)
    return prefix, file.read(min(int.from_bytes(prefix, "little"), _MAX_HEADER_BYTES))


def _names_format(header: bytes) -> bool:
    return f'"{FORMAT}"'.encode() in header


def _metadata(data: bytes, path: Path) -> Mapping[str, Any]:
    length = int.from_bytes(data[:_PREFIX_BYTES], "little")
    try:
        header = json.loads(data[_PREFIX_BYTES : _PREFIX_BYTES + length])
        metadata = header["__metadata__"]
        found, version = metadata["format"], metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _altered(path, f"a header that cannot be read ({error!r})") from error
    if found != FORMAT:
        raise ArtifactError(f"{path}: expected format {FORMAT!r}, found {found!r}; this is not a security vector")
    if version != VERSION:
        raise ArtifactError(
            f"{path}: expected format version {VERSION!r}, found {version!r}; update secvec or fit the vector again"
        )
    return cast(Mapping[str, Any], metadata)


def _check_digest(data: bytes, metadata: Mapping[str, Any], path: Path) -> None:
    position = data.find(_DIGEST_MARK)
    start = position + len(_DIGEST_MARK)
    if position < 0 or start + _DIGITS > len(data):
        raise _altered(path, "no digest")
    stored = "sha256:" + data[start : start + _DIGITS].decode("latin-1")
    found = _stamp(data[:start] + _BLANK + data[start + _DIGITS :])
    if not stored == found == metadata.get("digest"):
        raise _altered(path, f"{found!r} where the file says {stored!r}")


def _altered(path: Path, found: str) -> ArtifactError:
    return ArtifactError(f"{path}: the file is truncated or altered: {found}; fetch or fit the vector again")


def _parse_metadata(metadata: Mapping[str, Any], path: Path) -> tuple[float, VectorInfo]:
    try:
        document: dict[str, Any] = json.loads(metadata["info"])
        return float(metadata["scale"]), VectorInfo(**_checked_info(document))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected a scale and an info, found {error!r}; fit the vector again") from error


def _checked_info(document: dict[str, Any]) -> dict[str, Any]:
    kinds = {name.name: str if name.name in _TEXTS else dict for name in fields(VectorInfo)}
    if document.keys() != kinds.keys():
        raise ValueError(f"info must hold {sorted(kinds)}, holds {sorted(document)}")
    for name, kind in kinds.items():
        if not isinstance(document[name], kind):
            raise ValueError(f"info.{name} must be {kind.__name__}, is {document[name]!r}")
    return document


_TEXTS = frozenset({"kind", "base", "tokenizer", "chat_template", "data"})


def _pair(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Pair `<site>.A` with `<site>.B`; a name that is neither, or alone, is an error."""
    sites = sorted({name.rpartition(".")[0] for name in tensors})
    expected = {f"{site}.{name}" for site in sites for name in "AB"}
    if missing := sorted(expected - tensors.keys()):
        raise ArtifactError(f"expected factors A and B for each site, missing {', '.join(missing[:3])}")
    if extra := sorted(tensors.keys() - expected):
        raise ArtifactError(f"expected only factors named SITE.A and SITE.B, found {', '.join(extra[:3])}")
    return {site: Factors(tensors[f"{site}.A"], tensors[f"{site}.B"]) for site in sites}
