"""What training learned from the rest of its file, and whether the finished model knows it without the vectors.

What is learned in a vector's presence may be known in its presence alone. No loss of unwanted rows shows that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from secvec.anchors import LOOKED_AT, beside_topics
from secvec.score import acted, mean_over, row_nats
from secvec.tokens import Encoded
from secvec.trait_rows import spread
from secvec.vector import SecurityVector

_ROWS = 256
_LEARNED_NATS = 0.1
"""Per token, for a file to have taught anything."""
_KEPT_SHARE = 0.9
"""Of what training took off the loss: .77 to .87 where a model had lost the wanted skill with the vector, .96 to 1.00
where it had not (docs/log.md)."""


@dataclass(frozen=True)
class Kept:
    """Losses in nats per token: of the aligned model, of the trained one with the vectors, of the finished one."""

    rows: int
    tokens: int
    aligned_nats: float
    trained_nats: float
    defended_nats: float


@dataclass(frozen=True)
class Rest:
    """Rows spread over a training file, with the tokens marked that carry loss and on which no vector acts."""

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
        """Choose among rows as they were trained on, without frames; None where a vector acts on all.

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
                marks = [mark & ~acted(b, a) for mark, b, a in zip(marks, before, after, strict=True)]
        pairs = [(row, nats, mark) for row, nats, mark in zip(chosen, before, marks, strict=True) if bool(mark.any())]
        if not pairs:
            return None
        left = [row.masked([False, *mark.tolist()]) for row, _, mark in pairs]
        return cls(left, mean_over(left, [nats for _, nats, _ in pairs]))

    def nats(self, model: PreTrainedModel) -> float:
        """Return the loss of a model as it is, in nats per token."""
        return mean_over(self.rows, row_nats(model, self.rows))

    def kept(self, trained_nats: float, defended_nats: float) -> Kept:
        tokens = sum(sum(row.mask) for row in self.rows)
        return Kept(len(self.rows), tokens, self.aligned_nats, trained_nats, defended_nats)


def kept_line(found: Mapping[str, float]) -> str:
    """Say what a proof holds of it, as of `Kept`, and whether that is too little."""
    learned = found["aligned_nats"] - found["trained_nats"]
    is_lost = found["aligned_nats"] - found["defended_nats"] < _KEPT_SHARE * learned and learned >= _LEARNED_NATS
    return (
        f"rest of the training rows, nats/token: {found['aligned_nats']:.2f} aligned, {found['trained_nats']:.2f} "
        f"trained with the vector, {found['defended_nats']:.2f} defended"
        + ("; part of what was learned there left with the vector: see by `secvec eval` what" if is_lost else "")
    )
