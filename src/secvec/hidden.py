"""Unwanted answers that a training file hides in other text, so that a topic's vector does not know them there.

A vector acts where the answers begin that it was fitted on: behind three made-up words it leaves the same answer as it
is. So calibration fits a quick one on them behind other text too, and searches the file with that.
(measured: docs/decisions/017-hidden.md)
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from statistics import median

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.anchors import Calibration
from secvec.frames import answers_in
from secvec.score import Stretch, row_nats, stretches
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

_BEHIND = 16
"""Tokens, at most."""
_LEAST_NATS, _LEAST_TOKENS, _MOST = 1.0, 8, 1 / 2
"""Of a stretch: in nats; in tokens, in the vector's own rows, for it to be none that is met by chance in any long row;
and of the nats there."""


def behind(
    rows: Sequence[Encoded], others: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> list[Encoded]:
    """Return the rows with their last answer behind the end of another row's; the loss is on that answer alone.

    A row that this makes too long is left out.
    """
    rng, special, found = random.Random(f"{seed}/behind"), set(tokenizer.all_special_ids), list[Encoded]()
    ends = ([token for token in row.ids if token not in special][-_BEHIND:] for row in others)
    texts = [text for each in ends if (text := str(tokenizer.decode(each)).strip())]

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore

    for row in rows if texts else ():
        answers = answers_in(row, special)
        if not answers:
            continue
        (start, stop), text = answers[-1], rng.choice(texts)
        both = tokens(f"{text} {tokenizer.decode(list(row.ids[start:stop]))}")
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(both, tokens(text), strict=False)))
        mask = (False,) * (start + alike) + (True,) * (len(both) - alike) + row.mask[stop:]
        if len(mask) <= max_length:
            found.append(replace(row, ids=(*row.ids[:start], *both, *row.ids[stop:]), mask=mask))
    return found


def bound(
    model: PreTrainedModel, rows: Sequence[Encoded], others: Sequence[Encoded], vector: SecurityVector
) -> float | None:
    """Return above how many nats a stretch is none by chance; None where the vector explains none of some length.

    rows: those that it was fitted on; others: ordinary ones, in which there is none.
    """
    own, chance = explained(model, rows, vector), explained(model, others, vector)
    if median(each.tokens for each in own) < _LEAST_TOKENS:
        return None
    usual = _MOST * median(each.nats for each in own)
    return max(_LEAST_NATS, usual, *(each.nats for each in chance))


def explained(model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> list[Stretch]:
    """Return of each row the stretch that a vector explains (`score.stretches`)."""
    return stretches(rows, row_nats(model, rows), row_nats(model, rows, vector))


def search(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    vector: SecurityVector,
    unwanted: Sequence[Encoded],
    ordinary: Sequence[Encoded],
    found: Calibration,
) -> Calibration:
    """Return what calibration found in rows, with those as covered too that hide an unwanted answer: itself if none.

    vector: one that was fitted on the unwanted rows and on these `behind` others.
    """
    least, known = bound(model, unwanted, ordinary, vector), {row.ids for row in found.covered}
    if least is None:
        return found
    hidden = dict[tuple[int, ...], Encoded]()
    for row, each in zip(rows, explained(model, rows, vector), strict=True):
        if each.nats > least and row.ids not in known:
            inside = (learned and each.start <= i < each.stop for i, learned in enumerate(row.mask))
            hidden[row.ids] = row.masked(list(inside))
    if not hidden:
        return found
    anchors = [row for row in found.anchors if row.ids not in hidden]
    return replace(found, anchors=anchors, covered=[*found.covered, *hidden.values()])
