"""Where a trained folder comes from: the folded model it was trained on, the base under that, and the vectors in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secvec import artifact
from secvec.errors import CheckpointError
from secvec.record import FoldRecord, read_record
from secvec.tripwire import PROVENANCE, VECTORS_FOLDER, Tripwire, read_json, read_tripwire
from secvec.vector import SecurityVector


@dataclass(frozen=True)
class Origin:
    """kind: a whole checkpoint ("full"), or an adapter on the folded model; vectors: in the order they were folded."""

    kind: Literal["full", "adapter"]
    base: Path
    folded: Path
    record: FoldRecord
    vectors: tuple[SecurityVector, ...]

    def check_base(self, found: str) -> None:
        """Refuse a base, of the digest `found`, other than the one that was folded, byte for byte."""
        if found != self.record.base:
            raise CheckpointError(
                f"{self.base}: expected the base model {self.record.base!r} that was folded, found {found!r}; "
                "it was changed or is another model: say where the right one is (--base)"
            )


def find_origin(trained: Path, *, base: Path | None, folded: Path | None) -> Origin:
    """Follow a trained folder back to what it was made of; `base` and `folded` override folders that were moved.

    Raises CheckpointError when it was not trained on a folded model, is already unfolded, or when a record, vector or
    mark on the way is missing or altered.
    """
    if (trained / PROVENANCE).exists():
        raise CheckpointError(
            f"{trained}: expected a model trained on a folded one, found one already unfolded; use it"
        )
    adapter = (trained / "adapter_config.json").exists()
    folded, mark = _adapter_mark(trained, folded) if adapter else _checkpoint_mark(trained, folded)
    record = read_record(folded, mark)
    found_base = (base or Path(record.base_path)).absolute()
    if not found_base.is_dir():
        raise CheckpointError(f"{found_base}: expected the base model's folder, found none; say where it is (--base)")
    vectors = tuple(_vector(folded, number, digest) for number, digest in enumerate(record.vectors))
    return Origin("adapter" if adapter else "full", found_base, folded, record, vectors)


def vector_path(folded: Path, number: int) -> Path:
    return folded / VECTORS_FOLDER / f"vector-{number}.safetensors"


def _checkpoint_mark(trained: Path, folded: Path | None) -> tuple[Path, Tripwire]:
    if not (trained / "config.json").exists():
        raise CheckpointError(f"{trained}: expected a model or adapter folder, found no config.json; check the path")
    mark = read_tripwire(trained)
    if mark is None:
        raise CheckpointError(
            f"{trained}: was not trained on the folded model: its config.json carries no security vector mark; "
            "train on the folder that `secvec fold` wrote"
        )
    return (folded or Path(mark.folded_path)).absolute(), mark


def _adapter_mark(trained: Path, folded: Path | None) -> tuple[Path, Tripwire]:
    """Take an adapter's mark from the folded model it names as its base.

    An adapter carries no mark of its own. Where the folded folder was moved, the path in the adapter must be the one
    that the folder had when it was written.
    """
    named = str(_adapter_base(read_json(trained / "adapter_config.json"), trained))
    folder = folded if folded is not None else Path(named)
    mark = read_tripwire(folder)
    if mark is None or (folded is not None and not _is_same_folder(named, folded, mark)):
        raise CheckpointError(
            f"{trained}: was not trained on the folded model: its base {named!r} carries no security vector mark; "
            "train on the folder that `secvec fold` wrote, or say where that was moved (--folded)"
        )
    return folder.absolute(), mark


def _adapter_base(config: Mapping[str, Any], trained: Path) -> str:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{trained}: expected base_model_name_or_path in adapter_config.json, found {base!r}")
    return base


def _is_same_folder(named: str, folded: Path, mark: Tripwire) -> bool:
    return str(Path(named).absolute()) == mark.folded_path or Path(named).resolve() == folded.resolve()


def _vector(folded: Path, number: int, digest: str) -> SecurityVector:
    path = vector_path(folded, number)
    vector = artifact.load(path)
    if (found := artifact.digest(vector)) != digest:
        raise CheckpointError(f"{path}: expected the vector {digest!r} that was folded, found {found!r}; fold again")
    return vector
