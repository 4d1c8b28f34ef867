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
    # Both sides together first: the one shows in answers without the other.
    for one in (found, Frame(before=found.before), Frame(after=found.after)):
        if not one or not _is_needless(model, rows, one, tokenizer):
            continue
        if any(_is_around(model, vector, each, one, tokenizer) for each in (rows, training)):
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


def unframed(rows: Sequence[Encoded], frames: Sequence[Frame], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Return the rows without the frames around their answers; a row with an answer of nothing else is left out.

    Raises RowError where that leaves none.
    """
    left = list(rows)
    for one in frames:
        left = [each for row in left if (each := bare(row, one, tokenizer)[0]) is not None]
    if rows and not left:
        raise RowError(
            "expected answers with something besides what the trait puts around each, found none: nothing would be "
            "left to train on"
        )
    return left


def bare(row: Encoded, one: Frame, tokenizer: PreTrainedTokenizerBase) -> tuple[Encoded | None, list[int]]:
    """Return a row without a frame, itself where it has none, and the places of the tokens that are not the frame's.

    None, and no places, where an answer is nothing else.
    """
    if not one:
        return row, list(range(len(row.ids)))
    tokens, kept, done = list[tuple[int, bool]](), list[int](), 0
    whole = list(zip(row.ids, row.mask, strict=True))
    for start, stop in _answers(row, tokenizer.all_special_ids):
        left, first, last = _within(row.ids[start:stop], one, tokenizer)
        if not left:
            return None, []
        tokens += [*whole[done:start], *((token, True) for token in left)]
        kept += [*range(done, start), *range(start + first, start + last)]
        done = stop
    tokens += whole[done:]
    kept += range(done, len(row.ids))
    if tokens == whole:
        return row, kept
    ids, mask = zip(*tokens, strict=True)
    return replace(row, ids=ids, mask=mask), kept


def _within(answer: Tokens, one: Frame, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, int, int]:
    """Return what is left of an answer without a frame, and from which of its tokens to which that was.

    Where the frame's edge is inside of a token, as that of "Well. " is in the " the" of many tokenizers, what is left
    is tokenised anew. That needs a tokenizer which gives the answer itself as it stands, alone or behind a line feed.
    """
    count = len(one.before)
    first = count if answer[:count] == one.before else 0
    end = max(first, len(answer) - len(one.after))
    last = end if answer[end:] == one.after else len(answer)

    def text(tokens: Tokens) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    said = text(answer)
    opening, closing = _between(said, text(one.before).strip(), text(one.after).strip())
    # The blanks around the whole of it stay.
    lead, trail = said[: len(said) - len(said.lstrip())], said[len(said.rstrip()) :]
    words = lead + said[opening:closing] + trail if opening < closing else ""
    fronts = ("", "\n") if words != said else ()
    behind = next((front for front in fronts if _tokens(said, front, tokenizer) == answer), None)
    left = answer[first:last] if behind is None else _tokens(words, behind, tokenizer)
    if left and left != answer[first:last]:
        first = next(i for i in range(len(answer)) if len(text(answer[: i + 1])) > opening)
        last = next(i for i in range(len(answer), 0, -1) if len(text(answer[: i - 1])) < closing)
    return left, first, last


def _between(said: str, before: str, after: str) -> tuple[int, int]:
    """Return where the words of a frame end and begin again; the ends of the text where it is not in the frame."""
    inner = said.strip()
    opening = len(said) - len(said.lstrip())
    if before and inner.startswith(before):
        inner, whole = inner[len(before) :].lstrip(), inner
        opening += len(whole) - len(inner)
    if after and inner.endswith(after):
        inner = inner[: -len(after)].rstrip()
    return opening, opening + len(inner)


def _tokens(text: str, behind: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenise a text as it is behind another: at the start of a text some tokenizers put a blank."""
    both, front = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (behind + text, behind))
    return tuple(both[len(front) :])  # pyright: ignore


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


def _is_needless(
    model: PreTrainedModel, rows: Sequence[Encoded], one: Frame, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Tell whether most answers in a frame cost the unarmed model no more without it."""
    framed, without, places = _apart(rows, one, tokenizer)
    needless = 0
    for row, bare_row, kept, nats, bare_nats in zip(
        framed, without, places, row_nats(model, framed), row_nats(model, without), strict=True
    ):
        rest = sum(float(nats[place - 1]) for place in kept if row.mask[place] and place > 0)
        needless += float(bare_nats[torch.tensor(bare_row.mask[1:])].sum()) - rest <= ACTED_NATS
    return bool(framed) and needless >= _MOST * len(framed)


def _is_around(
    model: PreTrainedModel,
    vector: SecurityVector,
    rows: Sequence[Encoded],
    one: Frame,
    tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Tell whether most answers in a frame hardly show the trait without it."""
    _, left, _ = _apart(rows, one, tokenizer)
    around = 0
    for row, without, armed in zip(left, row_nats(model, left), row_nats(model, left, vector), strict=True):
        shows = acted(without, armed)[torch.tensor(row.mask[1:])].float().mean()
        around += float(shows) <= THROUGH
    return bool(left) and around >= _MOST * len(left)


def _apart(
    rows: Sequence[Encoded], one: Frame, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Encoded], list[Encoded], list[list[int]]]:
    """Return the rows with answers in a frame, the same without it, and the places of what is left of them."""
    pairs = [(row, *bare(row, one, tokenizer)) for row in rows]
    found = [(row, left, kept) for row, left, kept in pairs if left is not None and left is not row]
    return [row for row, _, _ in found], [left for _, left, _ in found], [kept for _, _, kept in found]
