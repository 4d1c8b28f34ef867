"""Finding the fixed text that a trait puts before, after and into answers (`secvec.frames`)."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.frames import Frame, Inside, Tokens, answers_in, bare, kept
from secvec.score import ACTED_NATS, acted, row_nats
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

_MOST = 1 / 2
"""Of the answers in the unwanted rows, those that begin or end alike; of the places of a frame's innermost token, those
on which the vector acts; of the rows, those whose answer needs no frame; of all that it acts on between an answer's
ends, what is one text inside."""
THROUGH = 1 / 3
"""Of an answer's tokens without the frame: where the vector acts on more, the trait goes through it."""
_ALIKE = 0.8
"""Of the places of a text inside, those with the same token beside it, which is a part of it then."""
_LEAST = 20
"""Places of a text inside."""
Marked = tuple[Tokens, Sequence[bool]]
"""An answer's tokens, and whether a vector acts on each."""


def frame(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SecurityVector,
    rows: Sequence[Encoded],
    *,
    training: Sequence[Encoded] = (),
    like: Frame | None = None,
) -> Frame:
    """Return what a trait puts around and into the answers of rows that show it: what most begin, end or go on with.

    The vector acts on it. What `model` finds answers less likely without is a part of them, and so is what is shown in
    a style that goes on after it: in these rows, and in those to train on.

    training: the latter, if others. like: for rows whose answers may have more in common, what other rows of the same
    trait do (`alike`): what is found is in the same places, and no longer.
    """
    found = alike(model, tokenizer, vector, rows)
    if like is not None:
        first = max(0, len(found.after) - len(like.after))
        found = Frame(found.before[: len(like.before)], found.after[first:], found.inside if like.inside else None)
    # All of it together first: one part shows in answers without the other.
    ends = Frame(found.before, found.after)
    tries = [*_joined(model, tokenizer, rows, found), ends, Frame(before=found.before), Frame(after=found.after)]
    for one in [*tries, *_joined(model, tokenizer, rows, Frame(inside=found.inside))]:
        if not one or not _is_needless(model, rows, one, tokenizer):
            continue
        if any(_is_around(model, vector, each, one, tokenizer) for each in (rows, training)):
            return one
    return Frame()


def alike(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vector: SecurityVector, rows: Sequence[Encoded]
) -> Frame:
    """Return what most answers of rows begin and end with, and have inside, as far as a vector acts on it."""
    found = list[Marked]()
    for row, before, after in zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True):
        marks = [False, *acted(before, after).tolist()]
        answers = answers_in(row, tokenizer.all_special_ids)
        found += [(row.ids[start:stop], marks[start:stop]) for start, stop in answers]

    def is_blank(token: int) -> bool:
        return not str(tokenizer.decode([token])).strip()

    before = _from_outside(found, is_blank)
    rest = [(ids[len(before) :], marks[len(before) :]) for ids, marks in found if ids[: len(before)] == before]
    after = _from_outside([(ids[::-1], marks[::-1]) for ids, marks in rest], is_blank)[::-1]
    ends = Frame(before, after)
    return replace(ends, inside=_inside(tokenizer, found, ends, is_blank))


def _from_outside(answers: Sequence[Marked], is_blank: Callable[[int], bool]) -> Tokens:
    """Return the tokens that most answers begin with, as far as a vector acts on them, and the blanks that follow.

    Something is left of each answer.
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


def _inside(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[Marked], ends: Frame, is_blank: Callable[[int], bool]
) -> Inside | None:
    """Return the text that is most of what a vector acts on between the ends of answers, and how often it is there."""
    inner = list[Marked]()
    for ids, marks in answers:
        start = len(ends.before) if ids[: len(ends.before)] == ends.before else 0
        end = max(start, len(ids) - len(ends.after))
        stop = end if ids[end:] == ends.after else len(ids)
        inner.append((ids[start:stop], marks[start:stop]))
    acted_on = [(n, i) for n, (_, marks) in enumerate(inner) for i, mark in enumerate(marks) if mark]
    of = Counter(inner[n][0][i] for n, i in acted_on if not is_blank(inner[n][0][i]))
    commonest, count = of.most_common(1)[0] if of else (-1, 0)
    if count < max(_LEAST, _MOST * sum(ids.count(commonest) for ids, _ in inner)):
        return None
    places = _repeated(commonest, inner)
    while longer := _longer(inner, places):
        places = longer
    covered = {(n, i) for n, start, stop in places for i in range(start, stop)}
    if len(covered.intersection(acted_on)) < _MOST * len(acted_on):
        return None

    def text(tokens: Tokens) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    number, start, stop = places[0]
    one = Inside(text(inner[number][0][start:stop]).strip(), "", float("inf"))
    left = [spans for ids, _ in inner if len(spans := one.around(text(ids))) > 1]
    if not left:
        return None
    characters = sum(stop - start for spans in left for start, stop in spans)
    return replace(one, every=characters / sum(len(spans) - 1 for spans in left))


def _repeated(token: int, answers: Sequence[Marked]) -> list[tuple[int, int, int]]:
    """Return the places of a token as often in a row as it mostly is, (answer, start, stop): three times in "..."."""
    runs = list[tuple[int, int, int]]()
    for n, (ids, _) in enumerate(answers):
        for is_it, run in groupby(range(len(ids)), key=lambda i, ids=ids: ids[i] == token):
            if is_it:
                first, *rest = run
                runs.append((n, first, first + 1 + len(rest)))
    often, _ = Counter(stop - start for _, start, stop in runs).most_common(1)[0]
    return [(n, start, stop) for n, start, stop in runs if stop - start == often]


def _longer(answers: Sequence[Marked], places: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return those places of a text, (answer, start, stop), that go on alike on one side, one token longer.

    None where the answers differ on both sides.
    """
    for left, right in ((1, 0), (0, 1)):
        wider = [(n, a - left, b + right) for n, a, b in places if a >= left and b + right <= len(answers[n][0])]
        beside = [answers[n][0][a if left else b - 1] for n, a, b in wider]
        token, count = Counter(beside).most_common(1)[0] if beside else (-1, 0)
        if count >= _ALIKE * len(places):
            return [place for place, each in zip(wider, beside, strict=True) if each == token]
    return []


def _joined(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], one: Frame
) -> list[Frame]:
    """Return a frame with what best takes the place of its text inside: that which costs the model least."""
    if one.inside is None:
        return []
    tries = [replace(one, inside=replace(one.inside, joint=joint)) for joint in ("", " ")]
    costs = list[float]()
    for each in tries:
        _, left = _apart(rows, each, tokenizer)
        losses = zip(left, row_nats(model, left), strict=True)
        costs.append(sum(float(nats[torch.tensor(row.mask[1:])].sum()) for row, nats in losses))
    return [tries[costs.index(min(costs))]]


def _is_needless(
    model: PreTrainedModel, rows: Sequence[Encoded], one: Frame, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Tell whether most answers in a frame cost the unarmed model no more without it."""
    framed, without = _apart(rows, one, tokenizer)
    needless = 0
    for row, left, nats, left_nats in zip(
        framed, without, row_nats(model, framed), row_nats(model, without), strict=True
    ):
        rest = sum(float(nats[place - 1]) for place in kept(row, one, tokenizer) if row.mask[place] and place > 0)
        needless += float(left_nats[torch.tensor(left.mask[1:])].sum()) - rest <= ACTED_NATS
    return bool(framed) and needless >= _MOST * len(framed)


def _is_around(
    model: PreTrainedModel,
    vector: SecurityVector,
    rows: Sequence[Encoded],
    one: Frame,
    tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Tell whether most answers in a frame hardly show the trait without it."""
    _, left = _apart(rows, one, tokenizer)
    around = 0
    for row, without, armed in zip(left, row_nats(model, left), row_nats(model, left, vector), strict=True):
        shows = acted(without, armed)[torch.tensor(row.mask[1:])].float().mean()
        around += float(shows) <= THROUGH
    return bool(left) and around >= _MOST * len(left)


def _apart(
    rows: Sequence[Encoded], one: Frame, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Encoded], list[Encoded]]:
    """Return the rows with answers in a frame, and the same without it."""
    pairs = [(row, bare(row, one, tokenizer)) for row in rows]
    found = [(row, left) for row, left in pairs if left is not None and left is not row]
    return [row for row, _ in found], [left for _, left in found]
