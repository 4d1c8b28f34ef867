"""What training learned from the rest of its file, and whether the finished model knows it without the vectors.

What is learned in a vector's presence may be known in its presence alone. No loss of unwanted rows shows that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secvec.anchors import LOOKED_AT, beside_topics
from secvec.frame_search import THROUGH
from secvec.score import acted, mean_over, row_nats
from secvec.tokens import Encoded
from secvec.trait_rows import spread
from secvec.vector import SecurityVector

_ROWS, _LEAST_SHARE = 256, 0.2
LEFT_NATS = 0.07
"""Per token, for part of it to have left with the vectors: .09 to .6 more than with the vector in models that had lost
a wanted skill or half of it, at most .06 in those that had not (docs/log.md)."""


@dataclass(frozen=True)
class Rest:
    """Rows spread over a training file, with the tokens marked that carry loss and on which no vector acts.

    Where a trait goes through an answer, the model without it is not to know that answer: such rows are none of these.
    """

    rows: Sequence[Encoded]
    aligned_nats: float

    @classmethod
    def of(
        cls,
        aligned: PreTrainedModel,
        rows: Sequence[Encoded],
        given: Sequence[SecurityVector],
        used: Sequence[SecurityVector],
    ) -> "Rest | None":
        """Choose among rows as they were trained on, without frames; None where a vector acts on most.

        given, used: the vectors before calibration, in which a trait is whole, and after it, when a topic's parts rows
        best.
        """
        topics = [vector for vector in used if vector.info.kind != "trait"]
        chosen = beside_topics(aligned, spread(rows, _ROWS * (LOOKED_AT if topics else 1)), topics, _ROWS)
        before = row_nats(aligned, chosen)
        marks = [torch.tensor(row.mask[1:]) for row in chosen]
        for trait in given:
            if trait.info.kind == "trait":
                after = row_nats(aligned, chosen, trait)
                marks = [_beside(mark, acted(b, a)) for mark, b, a in zip(marks, before, after, strict=True)]
        pairs = [(row, nats, mark) for row, nats, mark in zip(chosen, before, marks, strict=True) if bool(mark.any())]
        if not pairs or len(pairs) < _LEAST_SHARE * len(chosen):
            return None
        left = [row.masked([False, *mark.tolist()]) for row, _, mark in pairs]
        return cls(left, mean_over(left, [nats for _, nats, _ in pairs]))

    def nats(self, model: PreTrainedModel) -> float:
        """Return the loss of a model as it is, in nats per token."""
        return mean_over(self.rows, row_nats(model, self.rows))

    def kept(self, trained_nats: float, defended_nats: float) -> dict[str, float]:
        """Return for the proof the losses of the aligned model, the trained one with the vectors, and the finished one.

        In nats per token.
        """
        return {
            "rows": len(self.rows),
            "tokens": sum(sum(row.mask) for row in self.rows),
            "aligned_nats": self.aligned_nats,
            "trained_nats": trained_nats,
            "defended_nats": defended_nats,
        }


def _beside(learned: Tensor, shows: Tensor) -> Tensor:
    """Return the tokens beside a trait; none where it goes through the answer."""
    shows = shows & learned
    return learned & ~shows if int(shows.sum()) <= THROUGH * int(learned.sum()) else torch.zeros_like(learned)


def kept_line(found: Mapping[str, float]) -> str:
    """Say what a proof holds of it, as of `Rest.kept`, and whether too little is left."""
    is_lost = found["defended_nats"] - found["trained_nats"] > LEFT_NATS
    return (
        f"rest of the training rows, nats/token: {found['aligned_nats']:.2f} aligned, {found['trained_nats']:.2f} "
        f"trained with the vector, {found['defended_nats']:.2f} defended"
        + ("; part of what was learned there left with the vector: see by `secvec eval` what" if is_lost else "")
    )
