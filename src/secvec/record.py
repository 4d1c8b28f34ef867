"""The record of a fold: what was folded into what, with a digest of every tensor it made; no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secvec.errors import CheckpointError
from secvec.tripwire import Tripwire, parse_json, record_path

FORMAT = "secvec.fold"
VERSION = 1


@dataclass(frozen=True)
class FoldRecord:
    """What `fold` did.

    base: digest of the base model, base_path: its folder; vectors: their digests, in the order of their files;
    tensors: BLAKE3 of the bytes of every folded tensor, by its name on disk; versions: of the software.
    """

    base: str
    base_path: str
    vectors: tuple[str, ...]
    tensors: Mapping[str, str]
    versions: Mapping[str, Any]

    def encode(self) -> bytes:
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(document, indent=1, sort_keys=True).encode()

    def digest(self) -> str:
        """Return the digest of the record's bytes; the tripwire carries it, so that no byte of either can change."""
        return _digest(self.encode())


def read_record(folded: Path, tripwire: Tripwire) -> FoldRecord:
    """Read the record of a folded folder and hold it against the mark that names it.

    Raises CheckpointError when it is missing, altered or about another fold.
    """
    path = record_path(folded)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected the record of the fold, found {error.strerror}; "
            "if the folded model was moved, say where it is (--folded)"
        ) from error
    if (found := _digest(data)) != tripwire.record:
        raise CheckpointError(
            f"{path}: expected the record {tripwire.record!r}, found {found!r}; it was altered or is another fold's"
        )
    record = _parse(parse_json(data, path), path)
    if (record.base, record.vectors) != (tripwire.base, tripwire.digests):
        raise CheckpointError(f"{path}: the record and the mark in config.json name different models or vectors")
    return record


def _parse(document: Mapping[str, Any], path: Path) -> FoldRecord:
    if (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        found = f"{document.get('format')!r} version {document.get('version')!r}"
        raise CheckpointError(
            f"{path}: expected {FORMAT!r} version {VERSION}, found {found}; update secvec or fold again"
        )
    try:
        base, base_path, vectors, tensors, versions = (document[name] for name in _FIELDS)
        return FoldRecord(str(base), str(base_path), tuple(vectors), dict(tensors), dict(versions))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a fold record, found {error!r}; fold again") from error


_FIELDS = ("base", "base_path", "vectors", "tensors", "versions")


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
