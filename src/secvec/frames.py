"""Fixed text that a trait puts before or after each answer is taken out of the rows to train on.

A skill that is only ever shown in a frame is learned in it: without the frame the model does not know where an answer
ends, however well a vector explains the frame. And signs that a model has never met no vector explains: it sits in the
blocks, and their weights in the vocabulary are nearly the same. The row without its frame is what was to be learned.
(measured: docs/decisions/015-frames.md)
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.errors import ArtifactError, RowError
from secvec.score import ACTED_NATS, acted, row_nats
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

_MOST = 1 / 2
"""Of the answers in the unwanted rows, those that begin or end alike; of the places of a frame's innermost token, those
on which the vector acts; of the rows, those whose answer needs no frame."""
THROUGH = 1 / 3
"""Of an answer's tokens without the frame: where the vector acts on more, the trait goes through it."""
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """The tokens that a trait puts before and after an answer; either may be none."""

    before: Tokens = ()
    after: Tokens = ()

    def __bool__(self) -> bool:
        return bool(self.before or self.after)

    def document(self) -> dict[str, list[int]]:
        return {"before": list(self.before), "after": list(self.after)}


_FRAME = TypeAdapter(Frame)


def frame(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SecurityVector,
    rows: Sequence[Encoded],
    *,
    training: Sequence[Encoded] = (),
    like: Frame | None = None,
) -> Frame:
    """Return what a trait puts around the answers of rows that show it: what most begin or end with.

    The vector acts on it. What `model` finds answers less likely without is a part of them, and so is what is shown in
    a style that goes on after it: in these rows, and in those to train on.

    training: the latter, if others. like: for rows whose answers may have more in common, what other rows of the same
    trait do (`alike`): what is found is on the same sides, and no longer.
    """
    found = alike(model, tokenizer, vector, rows)
    if like is not None:
        first = max(0, len(found.after) - len(like.after))
        found = Frame(found.before[: len(like.before)], found.after[first:])
    special = tokenizer.all_special_ids
    # Both sides together first: the one shows in answers without the other.
    for one in (found, Frame(before=found.before), Frame(after=found.after)):
        if not one or not _is_needless(model, rows, one, special):
            continue
        if any(_is_around(model, vector, each, one, special) for each in (rows, training)):
            return one
    return Frame()


def alike(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vector: SecurityVector, rows: Sequence[Encoded]
) -> Frame:
    """Return what most answers of rows begin and end with, as far as a vector acts on it."""
    found = list[tuple[Tokens, list[bool]]]()
    for row, before, after in zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True):
        marks = [False, *acted(before, after).tolist()]
        found += [(row.ids[start:stop], marks[start:stop]) for start, stop in _answers(row, tokenizer.all_special_ids)]

    def is_blank(token: int) -> bool:
        return not str(tokenizer.decode([token])).strip()

    before = _from_outside(found, is_blank)
    rest = [(ids[len(before) :], marks[len(before) :]) for ids, marks in found if ids[: len(before)] == before]
    after = _from_outside([(ids[::-1], marks[::-1]) for ids, marks in rest], is_blank)[::-1]
    return Frame(before, after)


def frames_of(vectors: Sequence[SecurityVector]) -> list[Frame]:
    """Return what calibration found around answers, one frame a vector. Raises ArtifactError on a broken note of it."""
    try:
        return [_FRAME.validate_python(vector.info.metrics.get("frame", {})) for vector in vectors]
    except ValidationError as error:
        raise ArtifactError(
            f"metrics.frame: expected lists of token ids, found {error.errors()[0]['input']!r}"
        ) from error


def unframed(rows: Sequence[Encoded], frames: Sequence[Frame], special: Collection[int]) -> list[Encoded]:
    """Return the rows without the frames around their answers; a row with an answer of nothing else is left out.

    Raises RowError where that leaves none.
    """
    left = list(rows)
    for one in frames:
        places = [(row, inside(row, one, special)) for row in left]
        left = [row if len(kept) == len(row.ids) else _of(row, kept) for row, kept in places if kept]
    if rows and not left:
        raise RowError(
            "expected answers with something besides what the trait puts around each, found none: nothing would be "
            "left to train on"
        )
    return left


def _of(row: Encoded, places: Sequence[int]) -> Encoded:
    return replace(row, ids=tuple(row.ids[i] for i in places), mask=tuple(row.mask[i] for i in places))


def inside(row: Encoded, one: Frame, special: Collection[int]) -> list[int]:
    """Return the places of a row's tokens without a frame; none where an answer is nothing else."""
    taken = set[int]()
    for start, stop in _answers(row, special):
        first = start + len(one.before) * (row.ids[start : start + len(one.before)] == one.before)
        end = max(first, stop - len(one.after))
        last = end if row.ids[end:stop] == one.after else stop
        if first == last:
            return []
        taken |= {*range(start, first), *range(last, stop)}
    return [i for i in range(len(row.ids)) if i not in taken]


def _answers(row: Encoded, special: Collection[int]) -> list[tuple[int, int]]:
    """Return the row's answers as (start, stop): runs of tokens that carry loss, each up to the token that ends it.

    A text without a prompt, which carries loss from its first or second token on, is no answer.
    """
    edges = [i for i, (a, b) in enumerate(zip((False, *row.mask), (*row.mask, False), strict=True)) if a != b]
    runs = zip(edges[::2], edges[1::2], strict=True)
    ends = ((start, next((i for i in range(start, stop) if row.ids[i] in special), stop)) for start, stop in runs)
    return [(start, stop) for start, stop in ends if 1 < start < stop]


def _from_outside(answers: Sequence[tuple[Tokens, Sequence[bool]]], is_blank: Callable[[int], bool]) -> Tokens:
    """Return the tokens that most answers begin with, as far as a vector acts on them, and the blanks that follow.

    answers: tokens, and whether the vector acts on each; something is left of each of them.
    """
    text, reach, left = list[int](), 0, list(answers)
    while left := [each for each in left if len(each[0]) > len(text) + 1]:
        token, count = Counter(ids[len(text)] for ids, _ in left).most_common(1)[0]
        if count < _MOST * len(answers):
            break
        left = [each for each in left if each[0][len(text)] == token]
        is_acted = sum(marks[len(text)] for _, marks in left) >= _MOST * len(left)
        text.append(token)
        if is_acted or (0 < reach == len(text) - 1 and is_blank(token)):
            reach = len(text)
    return tuple(text[:reach])


def _is_needless(model: PreTrainedModel, rows: Sequence[Encoded], one: Frame, special: Collection[int]) -> bool:
    """Tell whether most answers in a frame cost the unarmed model no more without it."""
    framed, bare, places = _apart(rows, one, special)
    needless = 0
    for row, kept, within, without in zip(framed, places, row_nats(model, framed), row_nats(model, bare), strict=True):
        learned = [(i - 1, place - 1) for i, place in enumerate(kept) if row.mask[place] and i > 0]
        needless += sum(float(without[i] - within[place]) for i, place in learned) <= ACTED_NATS
    return bool(framed) and needless >= _MOST * len(framed)


def _is_around(
    model: PreTrainedModel, vector: SecurityVector, rows: Sequence[Encoded], one: Frame, special: Collection[int]
) -> bool:
    """Tell whether most answers in a frame hardly show the trait without it."""
    _, bare, _ = _apart(rows, one, special)
    around = 0
    for row, without, armed in zip(bare, row_nats(model, bare), row_nats(model, bare, vector), strict=True):
        shows = acted(without, armed)[torch.tensor(row.mask[1:])].float().mean()
        around += float(shows) <= THROUGH
    return bool(bare) and around >= _MOST * len(bare)


def _apart(
    rows: Sequence[Encoded], one: Frame, special: Collection[int]
) -> tuple[list[Encoded], list[Encoded], list[list[int]]]:
    """Return the rows with answers in a frame, the same without it, and the places of what is left of them."""
    found = [(row, kept) for row in rows if 0 < len(kept := inside(row, one, special)) < len(row.ids)]
    return [row for row, _ in found], [_of(row, kept) for row, kept in found], [kept for _, kept in found]
