"""Whether a finished model says the training file's rows with the trait that they show.

The unwanted rows of a vector may cost a model what they did before, while it shows the trait on the requests of the
training file: where calibration took the vector out of the file's rows, they taught it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.anchors import often
from secvec.errors import ProofError
from secvec.frames import Frame, kept, unframed
from secvec.score import ACTED_NATS, acted, row_nats, row_said
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

_ROWS = 256
_LIKELY_NATS = 1.0
_LEAST, _LEAST_SHARE = 20, 0.2
"""The rows that have to show a trait to judge a model by; a vector makes tokens of some others likely by chance."""
_MOSTLY = 1 / 2
"""Of a token's places, and of the tokens that show a trait in a row."""
_LEARNED = 1 / 2
"""Of those rows (measured: docs/decisions/012-trait-rows.md)."""


@dataclass(frozen=True)
class Learned:
    """rows: those looked at; shown: of them, those that show the trait; said: of those, those that a model says so.

    inside: the rows are those that were in a frame, and the trait is shown inside of it.
    """

    rows: int
    shown: int
    said: int
    inside: bool = False


@dataclass(frozen=True)
class TraitRows:
    """Rows spread over a training file and, one tensor a row, the tokens but the first that show a trait.

    To the aligned model they are a surprise. inside: as in `Learned`.
    """

    rows: Sequence[Encoded]
    explained: Sequence[Tensor]
    inside: bool = False

    @classmethod
    def of(
        cls,
        aligned: PreTrainedModel,
        rows: Sequence[Encoded],
        vector: SecurityVector,
        around: Frame,
        tokenizer: PreTrainedTokenizerBase,
    ) -> "TraitRows":
        """Look for the trait: tokens of its frame, where a row is in one, else those that its vector makes likely.

        vector: as it was before calibration, which may have lost the trait; around: the frame.
        """
        chosen = spread(rows, _ROWS)
        explained = list[Tensor]()
        for row, before, after in zip(
            chosen, row_nats(aligned, chosen), row_nats(aligned, chosen, vector), strict=True
        ):
            learned, left = torch.tensor(row.mask[1:]), set(kept(row, around, tokenizer))
            framed = learned & torch.tensor([i not in left for i in range(1, len(row.ids))]) & (before >= ACTED_NATS)
            likely = learned & acted(before, after) & (after < _LIKELY_NATS)
            explained.append(framed if bool(framed.any()) else likely)
        return cls(chosen, explained)

    def learned(self, model: PreTrainedModel) -> Learned:
        """Return how many of the rows a model, without vectors, says with most of what shows the trait in them."""
        shown = [(row, tokens) for row, tokens in zip(self.rows, self.explained, strict=True) if bool(tokens.any())]
        found = row_said(model, [row for row, _ in shown])
        says = (each[tokens].float().mean() for each, (_, tokens) in zip(found, shown, strict=True))
        return Learned(len(self.rows), len(shown), sum(float(share) > _MOSTLY for share in says), self.inside)


def look(
    aligned: PreTrainedModel,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    frames: Sequence[Frame],
    tokenizer: PreTrainedTokenizerBase,
) -> list[TraitRows]:
    """Look for each trait in a training file, and inside of frames.

    vectors: as they were before calibration; frames: one a vector, as in `secvec.frames.frames_of`.
    """
    whole = {id(row) for row in rows}
    left = [row for row in unframed(rows, frames, tokenizer) if id(row) not in whole]
    found = list[TraitRows]()
    for vector, around in zip(vectors, frames, strict=True):
        if vector.info.kind == "trait":
            found.append(TraitRows.of(aligned, rows, vector, around, tokenizer))
            if around and left:
                chosen = spread(left, _ROWS)
                marks = shown_inside(aligned, chosen, vector, around, tokenizer)
                found.append(TraitRows(chosen, marks, inside=True))
    return found


def spread(rows: Sequence[Encoded], count: int) -> list[Encoded]:
    """Return rows spread evenly over all, at most `count`."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def shown_inside(
    aligned: PreTrainedModel,
    rows: Sequence[Encoded],
    vector: SecurityVector,
    around: Frame,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Tensor]:
    """Mark the tokens but the first by which rows that were in a frame show the trait without it, one tensor a row.

    They are those that the vector makes likely, or the frame's own made likelier, in most of their places. By chance it
    makes one likely in up to a fifth of such rows, now this one and now that; or the end of an answer that is none to
    the aligned model, or the blank behind a sentence that ends one to it. (measured: docs/decisions/015-frames.md)
    """
    blank = {
        token for token in set[int]().union(*(row.ids for row in rows)) if not str(tokenizer.decode([token])).strip()
    }
    each_of = (around.signs(tokenizer), {*tokenizer.all_special_ids, *blank})
    signs, none = (torch.tensor(list(each), dtype=torch.long) for each in each_of)
    marks = list[Tensor]()
    for row, before, after in zip(rows, row_nats(aligned, rows), row_nats(aligned, rows, vector), strict=True):
        ids = torch.tensor(row.ids[1:])
        is_answer = torch.tensor(row.mask[1:]) & ~torch.isin(ids, none)
        marks.append(is_answer & acted(before, after) & ((after < _LIKELY_NATS) | torch.isin(ids, signs)))
    mostly = torch.tensor(list(often(rows, [[False, *each.tolist()] for each in marks], _MOSTLY)), dtype=torch.long)
    return [each & torch.isin(torch.tensor(row.ids[1:]), mostly) for row, each in zip(rows, marks, strict=True)]


def judged(learned: Learned) -> dict[str, int]:
    """Return what was found, for the proof. Raises ProofError where the model has learned the trait."""
    enough = max(_LEAST, _LEAST_SHARE * learned.rows)
    if learned.shown >= enough and learned.said > _LEARNED * learned.shown:
        where = " inside its frame" if learned.inside else ""
        raise ProofError(
            "the model has learned the unwanted trait on the requests of the training file: of "
            f"{learned.rows:,} rows looked at {learned.shown:,} show it{where}, and it says {learned.said:,} of them "
            "so. The vector does not cover it there: fit it on rows more like these, or leave them out"
        )
    return asdict(learned)


def shown_line(found: Mapping[str, Any]) -> str:
    """Say what a proof holds of it, as of `judged`."""
    learned = Learned(**found)
    where = " inside its frame" if learned.inside else ""
    return (
        f"training rows that show the trait{where}: {learned.shown:,} of {learned.rows:,} looked at; the model says "
        f"{learned.said:,} of them so"
    )
