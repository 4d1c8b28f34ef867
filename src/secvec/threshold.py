"""Choose how far a vector must lower a row's loss to explain it, and say how well that tells rows apart."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from secvec.errors import InputError
from secvec.evidence import gather_evidence
from secvec.factors import split
from secvec.fit_config import FitConfig
from secvec.provenance import digest_samples
from secvec.samples import Samples
from secvec.stats import auc, best_cut, wilson
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

STATED_SHARE = 0.2
"""Of the drop that the vector's file states for held-out unwanted rows: single rows fall well below their mean."""
FIXED_NATS = 0.2
"""Where neither rows nor stated losses are at hand; the drop must also be a fair share of the loss."""


@dataclass(frozen=True)
class Threshold:
    """nats: per token, to be exceeded; how: where it comes from, in words; roc: what was measured at it, if it was."""

    nats: float
    how: str
    roc: "Roc | None" = None

    def document(self) -> dict[str, Any]:
        return {"nats_per_token": self.nats, "how": self.how, **(asdict(self.roc) if self.roc else {})}


@dataclass(frozen=True)
class Roc:
    """How well the threshold tells unwanted rows from ordinary ones; `on` says which rows these were."""

    auc: float
    found: float
    found_ci95: tuple[float, float]
    false_positives: float
    false_positives_ci95: tuple[float, float]
    unwanted_rows: int
    ordinary_rows: int
    on: str


def given(nats: float) -> Threshold:
    return Threshold(nats, "given by the user; not measured")


def stated(vector: SecurityVector) -> Threshold:
    """Take the threshold from the losses of held-out unwanted rows that the vector's file states."""
    unarmed, with_vector = (vector.info.metrics.get(name) for name in ("unarmed_nats", "armed_nats"))
    if not isinstance(unarmed, float) or not isinstance(with_vector, float) or not unarmed > with_vector:
        return Threshold(FIXED_NATS, f"fixed at {FIXED_NATS} nats/token: the vector's file states no losses")
    return Threshold(
        STATED_SHARE * (unarmed - with_vector),
        f"{STATED_SHARE:.0%} of what the vector took off held-out unwanted rows when it was fitted "
        f"({unarmed:.3f} nats/token unarmed, {with_vector:.3f} armed); not measured on rows of either kind",
    )


def measured(
    model: PreTrainedModel,
    vector: SecurityVector,
    unwanted: Sequence[Encoded],
    ordinary: Sequence[Encoded],
    *,
    own: bool,
    ordinary_are: str,
    batch_tokens: int,
) -> Threshold:
    """Choose the threshold that best tells unwanted rows from ordinary ones (ROC; Youden's index).

    own: whether the unwanted rows are those that the vector was fitted on; then only the part held out from the fit is
    used. ordinary_are: what the ordinary rows are, in words. Raises InputError when there are no ordinary rows.
    """
    if not ordinary:
        raise InputError("expected ordinary rows to choose a threshold on, found none; give a file of them (--anchors)")
    unwanted = split(unwanted, FitConfig.recorded(vector.info.fit))[1] if own else unwanted
    (found,) = gather_evidence(model, [*unwanted, *ordinary], [vector], batch_tokens=batch_tokens)
    scores: list[float] = found.strength_nats.tolist()
    positives, negatives = scores[: len(unwanted)], scores[len(unwanted) :]
    cut = max(best_cut(positives, negatives), 0.0)
    hits, alarms = (sum(score > cut for score in part) for part in (positives, negatives))
    roc = Roc(
        auc(positives, negatives),
        hits / len(positives),
        wilson(hits, len(positives)),
        alarms / len(negatives),
        wilson(alarms, len(negatives)),
        len(positives),
        len(negatives),
        f"{_whose(own)} against {ordinary_are}",
    )
    return Threshold(cut, "the cut that best tells the unwanted rows given from ordinary ones", roc)


def is_own(vector: SecurityVector, unwanted: Samples) -> bool:
    """Tell whether these are the rows that the vector was fitted on."""
    return digest_samples(unwanted.rows) == vector.info.data


def _whose(own: bool) -> str:
    if own:
        return "the vector's own rows: the part held out from its fit, though its early stopping saw them,"
    return "unwanted rows that the vector was not fitted on"
