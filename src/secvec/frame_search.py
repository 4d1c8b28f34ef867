"""Finding the fixed text that a trait puts before, after and into answers (`secvec.frames`)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.frames import Frame, Inside, Tokens, answers_in, bare, kept, text_of
from secvec.score import ACTED_NATS, acted, row_choices, row_nats
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

_MOST = 1 / 2
"""Of the answers in the unwanted rows, those that begin or end alike; of the places of a frame's innermost token, those
on which the vector acts; of the rows, those whose answer needs no frame."""
THROUGH = 1 / 3
"""Of an answer's tokens without the frame: where the vector acts on more, the trait goes through it."""
_ALIKE = 0.8
"""Of the places of a text inside, those with the same token beside it, which is a part of it then."""
_LEAST, _OFTEN = 20, 1 / 4
"""Places of a text inside, and as a share of those of any token that the vector acts on there."""
_TRIES = 8
"""Tokens of which it may be found."""
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
    answers = _marked(model, tokenizer, vector, rows)
    found = _ends(tokenizer, answers)
    if like is not None:
        first = max(0, len(found.after) - len(like.after))
        found = Frame(found.before[: len(like.before)], found.after[first:])
    file = training or rows
    # Between the sentences of a file may be what shorter answers have at their ends alone.
    insides = [(_inside(tokenizer, answers, found) if like is None or like.inside else None, rows)]
    insides.append((_ends_inside(tokenizer, file, found), file))
    joined = [(_joined(model, tokenizer, of, one), of) for one, of in insides if one is not None]
    # All of it together first: one part shows in answers without the other.
    tries = [(replace(found, inside=one), of) for one, of in joined]
    tries += [(found, rows), (Frame(before=found.before), rows), (Frame(after=found.after), rows)]
    tries += [(Frame(inside=one), of) for one, of in joined]
    texts = [
        *(one.text for one, _ in joined),
        *(text_of(each, tokenizer).strip() for each in (found.after, found.before)),
    ]
    others = (_other(model, tokenizer, rows, text) for text in dict.fromkeys(texts) if text)
    tries += [(Frame(inside=one), rows) for one in others if one is not None]
    for one, of in tries:
        if not one or not _is_needless(model, of, one, tokenizer):
            continue
        if any(_is_around(model, vector, each, one, tokenizer) for each in (rows, training)):
            return one
    return Frame()


def alike(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vector: SecurityVector, rows: Sequence[Encoded]
) -> Frame:
    """Return what most answers of rows begin and end with, as far as a vector acts on it."""
    return _ends(tokenizer, _marked(model, tokenizer, vector, rows))


def _marked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vector: SecurityVector, rows: Sequence[Encoded]
) -> list[Marked]:
    found = list[Marked]()
    for row, before, after in zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True):
        marks = [False, *acted(before, after).tolist()]
        answers = answers_in(row, tokenizer.all_special_ids)
        found += [(row.ids[start:stop], marks[start:stop]) for start, stop in answers]
    return found


def _ends(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Marked]) -> Frame:
    before = _from_outside(tokenizer, answers)
    rest = [(ids[len(before) :], marks[len(before) :]) for ids, marks in answers if ids[: len(before)] == before]
    after = _from_outside(tokenizer, [(ids[::-1], marks[::-1]) for ids, marks in rest])
    return Frame(before, after[::-1])


def _from_outside(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Marked]) -> Tokens:
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
        if is_acted or (0 < reach == len(text) - 1 and _is_blank(tokenizer, token)):
            reach = len(text)
    return tuple(text[:reach])


def _inside(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Marked], ends: Frame) -> Inside | None:
    """Return the text around the token that a vector acts on most between the ends of answers."""
    spans = [_between(ids, ends) for ids, _ in answers]
    inner = [(ids[start:stop], marks[start:stop]) for (ids, marks), (start, stop) in zip(answers, spans, strict=True)]
    acted_on = Counter(token for ids, marks in inner for token, mark in zip(ids, marks, strict=True) if mark)
    tokens = [token for token, _ in acted_on.most_common() if not _is_blank(tokenizer, token)]
    if not tokens:
        return None
    places = [_repeated(token, inner) for token in tokens[:_TRIES]]
    # A token may be in a text several times, and has no one neighbour then. An answer that comes often is no such text.
    least = _OFTEN * max(map(len, places))
    texts = [text for each in places if len(text := _widened(inner, each)) >= least]
    if not texts:
        return None
    number, start, stop = max(texts, key=lambda text: sum(stop - start for _, start, stop in text))[0]
    text = text_of(inner[number][0][start:stop], tokenizer).strip()
    return _how_often(text, [text_of(ids, tokenizer) for ids, _ in inner])


def _ends_inside(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], ends: Frame) -> Inside | None:
    """Return what answers end or begin with, where it is often between their ends too."""
    answers = [row.ids[start:stop] for row in rows for start, stop in answers_in(row, tokenizer.all_special_ids)]
    between = [text_of(ids[slice(*_between(ids, ends))], tokenizer) for ids in answers]
    texts = [text for each in (ends.after, ends.before) if (text := text_of(each, tokenizer).strip())]
    return next((found for text in texts if (found := _how_often(text, between))), None)


def _between(ids: Tokens, ends: Frame) -> tuple[int, int]:
    """Return from where to where an answer is between the ends of its frame, as far as it has them."""
    start = len(ends.before) if ids[: len(ends.before)] == ends.before else 0
    end = max(start, len(ids) - len(ends.after))
    return start, end if ids[end:] == ends.after else len(ids)


def _how_often(text: str, answers: Sequence[str]) -> Inside | None:
    """Return a text inside of answers with how often it is in those that have it; None where that is in few places."""
    one = Inside(text, "", float("inf"))
    left = [spans for answer in answers if len(spans := one.around(answer)) > 1]
    places = sum(len(spans) - 1 for spans in left)
    if places < _LEAST:
        return None
    return replace(one, every=sum(stop - start for spans in left for start, stop in spans) / places)


def _repeated(token: int, answers: Sequence[Marked]) -> list[tuple[int, int, int]]:
    """Return where a vector acts on a token, (answer, start, stop): as often in a row as it mostly is, as in "..."."""
    runs = list[tuple[int, int, int]]()
    for n, (ids, marks) in enumerate(answers):
        for is_it, run in groupby(range(len(ids)), key=lambda i, ids=ids: ids[i] == token):
            places = list(run)
            if is_it and any(marks[i] for i in places):
                runs.append((n, places[0], places[-1] + 1))
    often, _ = Counter(stop - start for _, start, stop in runs).most_common(1)[0]
    return [(n, start, stop) for n, start, stop in runs if stop - start == often]


def _widened(answers: Sequence[Marked], places: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    while longer := _longer(answers, places):
        places = longer
    return places


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


def _other(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], text: str
) -> Inside | None:
    """Return a text in answers with what the model mostly says in its place; None where that is nothing."""
    special = tokenizer.all_special_ids
    answers = [row.ids[start:stop] for row in rows for start, stop in answers_in(row, special)]
    one = _how_often(text, [text_of(ids, tokenizer) for ids in answers])
    if one is None:
        return None
    said = Counter[int]()
    # So that the blanks beside it are none of it.
    taken = Frame(inside=replace(one, instead=2 * text))
    for row, choices in zip(rows, row_choices(model, rows), strict=True):
        out = {*range(1, len(row.ids))}.difference(kept(row, taken, tokenizer))
        said.update(int(choices[i - 1]) for i in out if i - 1 not in out)
    # What a trait has begun the model goes on with, so that it may say the text itself.
    others = (text_of((token,), tokenizer).strip() for token, _ in said.most_common() if token not in special)
    other = next((each for each in others if each and each != text), None)
    return None if other is None else replace(one, instead=other)


def _joined(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], one: Inside) -> Inside:
    """Return a text inside with what best takes its place: that which then costs the model least."""
    tries, costs = [replace(one, joint=joint) for joint in ("", " ")], list[float]()
    for each in tries:
        _, left = _apart(rows, Frame(inside=each), tokenizer)
        losses = zip(left, row_nats(model, left), strict=True)
        costs.append(sum(float(nats[torch.tensor(row.mask[1:])].sum()) for row, nats in losses))
    return tries[costs.index(min(costs))]


def _is_needless(
    model: PreTrainedModel, rows: Sequence[Encoded], one: Frame, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Tell whether most answers in a frame cost the unarmed model no more without it.

    Where a text is in the place of another, those two count as well.
    """
    framed, without = _apart(rows, one, tokenizer)
    needless = 0
    for row, left, nats, left_nats in zip(
        framed, without, row_nats(model, framed), row_nats(model, without), strict=True
    ):
        is_other = one.inside is not None and one.inside.instead
        places = range(len(row.ids)) if is_other else kept(row, one, tokenizer)
        rest = sum(float(nats[place - 1]) for place in places if row.mask[place] and place > 0)
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


def _is_blank(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not text_of((token,), tokenizer).strip()
