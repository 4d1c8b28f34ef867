"""Disarm a checkpoint on disk: take the vectors out of what was trained on a folded model.

    W_final = W_base + (W_trained - W_folded)

W_folded is computed again, bit for bit, and held against the digests of the fold record. D is never subtracted from
W_trained: rounding would then change weights that training never touched.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from secvec.adapter import adapter_config, copy_adapter
from secvec.atomic import write_json
from secvec.blocks import site_tensors
from secvec.companions import base_config, copy_companions, copy_index, finished_config, model_config, write_config
from secvec.errors import CheckpointError, ProofError
from secvec.headers import read_index
from secvec.journal import Journal, layout
from secvec.matching import match_tensors
from secvec.origin import Origin, find_origin
from secvec.provenance import digest_file, digest_model, versions
from secvec.ranges import Progress, new_folder
from secvec.tripwire import PROVENANCE
from secvec.unfold_weights import Totals, Weights, write_weights

# A trained model holds the vector once: its share then differs from 1 by what training moved along it. At one half
# the folder more likely holds weights without the vector under a config with the mark.
_LOST_SHARE = 0.5


@dataclass(frozen=True)
class UnfoldReport:
    """What `unfold` did; stored in the finished folder.

    base, trained: digests of the models, record: of the fold record, vectors: of the vectors taken out; sites: tensors
    that held a vector, sites_changed: those that training changed; vector_share: how much of the vector D the trained
    weights held, 1 + <W_trained - W_folded, D> / <D, D>: 1 when training did not move along it.
    """

    kind: Literal["full", "adapter"]
    base: str
    base_path: str
    vectors: tuple[str, ...]
    record: str
    trained: str
    sites: int
    sites_changed: int
    vector_share: float
    versions: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        return {"format": "secvec.unfold", "version": 1, "state": "defended", **asdict(self)}


def unfold(
    trained: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    folded: str | Path | None = None,
    progress: Progress | None = None,
) -> UnfoldReport:
    """Take the vectors out of what was trained on a folded model and write the result to the new folder `out`.

    trained: a checkpoint (also a merged one), sharded in any way and in any float dtype, or a LoRA adapter. Base,
    vectors and record are found from its mark; `base` and `folded` say where those folders are if they were moved.
    A checkpoint comes out in the base's files and dtype; tensors that training did not touch have the base's bytes.
    An adapter is copied and names the base again. progress: called with (bytes done, bytes in total). What was killed
    goes on when called again, as `fold` does.

    Raises CheckpointError when the folder was not trained on a folded model, is already unfolded, or does not match its
    base, vectors or record in any byte; ArtifactError for an altered vector; ProofError when the trained weights hold
    half of the vectors or less.
    """
    trained, out = Path(trained).absolute(), Path(out).absolute()
    origin = find_origin(trained, base=Path(base) if base else None, folded=Path(folded) if folded else None)
    if origin.kind == "adapter":
        return _unfold_adapter(trained, out, origin)
    return _unfold_checkpoint(trained, out, origin, progress)


def _unfold_checkpoint(trained: Path, out: Path, origin: Origin, progress: Progress | None) -> UnfoldReport:
    config, original = model_config(trained), base_config(origin.base)
    index = read_index(origin.base)
    sites = site_tensors(index, origin.vectors, original)
    _check_sites(sites.keys(), origin)
    trained_index = read_index(trained)
    weights = Weights(index, trained_index, match_tensors(index, trained_index, trained), sites)
    with new_folder(out, resume=True) as partial:
        key = ["unfold", origin.record.vectors, original, layout(index), layout(trained_index), versions()]
        journal = Journal(partial, key, {entry.file.name for entry in index.values()})
        totals = write_weights(weights, partial, journal, progress)
        origin.check_base(totals.base)
        _check_folded(totals.folded, origin)
        _check_share(totals, trained)
        copy_index(origin.base, partial)
        copy_companions(origin.base, partial)
        copy_companions(trained, partial)
        write_config(finished_config(config, original), partial)
        report = _report("full", origin, totals)
        write_json(partial / PROVENANCE, report.document(), 0o644)
        journal.remove()
    return report


def _unfold_adapter(trained: Path, out: Path, origin: Origin) -> UnfoldReport:
    sites = {site for vector in origin.vectors for site in vector.sites}
    config = adapter_config(trained, sites)
    with new_folder(out) as partial:
        origin.check_base(digest_model(origin.base))
        copy_adapter(trained, partial, {**config, "base_model_name_or_path": str(origin.base)})
        copy_companions(trained, partial)
        found = digest_file(trained / "adapter_model.safetensors")
        report = _report("adapter", origin, Totals(origin.record.base, found, {}, len(sites), 0, 1.0))
        write_json(partial / PROVENANCE, report.document(), 0o644)
    return report


def _report(kind: Literal["full", "adapter"], origin: Origin, totals: Totals) -> UnfoldReport:
    return UnfoldReport(
        kind=kind,
        base=origin.record.base,
        base_path=str(origin.base),
        vectors=origin.record.vectors,
        record=origin.record.digest(),
        trained=totals.trained,
        sites=totals.sites,
        sites_changed=totals.sites_changed,
        vector_share=totals.vector_share,
        versions=versions(),
    )


def _check_sites(names: Iterable[str], origin: Origin) -> None:
    if set(names) != set(origin.record.tensors):
        raise CheckpointError(
            f"{origin.folded}: the record's tensors are not those of the vectors' sites in {origin.base}; fold again"
        )


def _check_folded(found: Mapping[str, str], origin: Origin) -> None:
    """Refuse when folding again does not give what the record promises."""
    for name, expected in origin.record.tensors.items():
        if found[name] != expected:
            raise CheckpointError(
                f"{origin.base}: {name}: expected the folded tensor {expected!r} of the record, folding again gave "
                f"{found[name]!r}; vector or record were altered: fold and train again"
            )


def _check_share(totals: Totals, trained: Path) -> None:
    if not totals.vector_share > _LOST_SHARE:
        share = round(totals.vector_share, 2) + 0.0
        raise ProofError(
            f"{trained}: expected weights that hold the security vector, found {share:.2f} of it: the vector was taken "
            "out before, or was never in: unfold the folder that the trainer wrote; if this is it, training undid the "
            "vector: lower the learning rate"
        )
