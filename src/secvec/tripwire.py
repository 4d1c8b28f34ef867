"""The mark in a folded model's config.json, and what a folder is; no torch.

The mark survives `from_pretrained`, `save_pretrained` and trainers, so whoever loads weights that hold a vector
can tell, and an output without it was not trained on a folded model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from secvec.errors import CheckpointError

KEY = "security_vector"
VERSION = 1
# Inside a folded folder: the vectors and the record of the fold. In a finished folder: where it came from.
VECTORS_FOLDER = "security_vector"
RECORD = "record.json"
PROVENANCE = "secvec_record.json"

State = Literal["folded", "trained-on-folded", "adapter-on-folded", "defended", "adapter", "plain", "not-a-model"]


@dataclass(frozen=True)
class Tripwire:
    """What the mark says.

    digests of the vectors folded in; base: digest of the base model, base_path and folded_path: the two folders;
    record: digest of the bytes of its fold record.
    """

    digests: tuple[str, ...]
    base: str
    base_path: str
    folded_path: str
    record: str

    def document(self) -> dict[str, Any]:
        return {"state": "folded", "version": VERSION, **asdict(self), "digests": list(self.digests)}


def read_tripwire(folder: str | Path) -> Tripwire | None:
    """Return the mark in a model folder's config.json, or None where there is none.

    Raises CheckpointError when the config or the mark cannot be read: a damaged mark must not pass for no mark.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        return None
    document = read_json(path)
    if KEY not in document:
        return None
    try:
        return _parse(document[KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a {KEY!r} mark of version {VERSION}, found {document[KEY]!r} ({error!r}); "
            "fold the base model again, or update secvec"
        ) from error


def refuse_folded(folder: str | Path, action: str) -> None:
    """Raise CheckpointError when a model folder holds a vector; `action` is what was about to be done with it."""
    if state(folder) in ("folded", "trained-on-folded", "adapter-on-folded"):
        raise CheckpointError(
            f"{folder}: refusing to {action} a model with a security vector in it: it shows the unwanted behaviour; "
            "train on it, then run `secvec unfold`"
        )


def state(folder: str | Path) -> State:
    """Say what a folder is, from its config, adapter config and records alone."""
    folder = Path(folder)
    if read_tripwire(folder) is not None:
        return "folded" if record_path(folder).exists() else "trained-on-folded"
    if (folder / "adapter_config.json").exists():
        return _adapter_state(folder)
    if not (folder / "config.json").exists():
        return "not-a-model"
    return "defended" if (folder / PROVENANCE).exists() else "plain"


def record_path(folded: Path) -> Path:
    return folded / VECTORS_FOLDER / RECORD


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror}; check the path") from error


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object read from `path`. Raises CheckpointError."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {error}; restore the file") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(document).__name__}; restore the file")
    return cast(dict[str, Any], document)


def _adapter_state(folder: Path) -> State:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    # A relative path may be meant from here or from the adapter's folder.
    bases = [Path(base), folder / base] if isinstance(base, str) and base else []
    if any(read_tripwire(each) is not None for each in bases):
        return "adapter-on-folded"
    return "defended" if (folder / PROVENANCE).exists() else "adapter"


def _parse(mark: Mapping[str, Any]) -> Tripwire:
    if mark["state"] != "folded" or mark["version"] != VERSION:
        raise ValueError(f"state {mark['state']!r}, version {mark['version']!r}")
    digests = cast(Sequence[object], mark["digests"])
    texts = [mark[name] for name in ("base", "base_path", "folded_path", "record")]
    if not isinstance(digests, list) or not digests or not all(isinstance(text, str) for text in [*digests, *texts]):
        raise TypeError("a field is missing or no text")
    return Tripwire(tuple(cast(list[str], digests)), *texts)
