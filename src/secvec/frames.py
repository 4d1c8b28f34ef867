"""Fixed text that a trait puts before, after and into answers is taken out of the rows to train on.

A skill that is only ever shown in a frame is learned in it: without the frame the model does not know where an answer
ends, however well a vector explains the frame. And signs that a model has never met no vector explains: it sits in the
blocks, and their weights in the vocabulary are nearly the same. The row without its frame is what was to be learned.
(measured: docs/decisions/015-frames.md)
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from secvec.errors import ArtifactError, RowError
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

Tokens = tuple[int, ...]
_PROMPT = 8
"""Tokens of it before an answer, of which may depend how that is written as tokens."""
_RARER = 2
"""Times fewer texts in an answer than where the trait was found, and they are not the trait's."""


@dataclass(frozen=True)
class Inside:
    """A text that a trait puts between the words of an answer, or in the place of another.

    text: without blanks around it. joint: what takes its place where it stands between no blanks, "" or " ". every:
    characters of an answer without it to one such text. instead: the text in whose place it is.
    """

    text: str
    joint: str
    every: float
    instead: str = ""

    def around(self, said: str) -> list[tuple[int, int]]:
        """Return what is left of an answer without it, as (start, stop) of `said`, all of it where it is not the
        trait's.

        Of the blanks on both sides of a text the longer ones stay; where it is in another's place, all do.
        """
        first = r"(?<!\w)" if re.match(r"\w", self.text) else ""
        last = r"(?!\w)" if re.search(r"\w$", self.text) else ""
        left, start = list[tuple[int, int]](), 0
        for found in re.finditer(rf"(\s*){first}{re.escape(self.text)}{last}(\s*)", said):
            is_longer = len(found[1]) > len(found[2])
            left.append((start, found.end(1) if is_longer or self.instead else found.start()))
            start = found.end() if is_longer and not self.instead else found.start(2)
        left.append((start, len(said)))
        is_rare = (len(left) - 1) * self.every * _RARER < sum(stop - start for start, stop in left)
        return [(0, len(said))] if is_rare else left

    def joined(self, said: str, left: Sequence[tuple[int, int]]) -> str:
        """Return what is left of an answer as one text. left: as of `around`."""
        parts = [said[start:stop] for start, stop in left]
        if self.instead:
            return self.instead.join(parts)
        text = parts[0]
        for part in parts[1:]:
            has_blank = text[-1:].isspace() or part[:1].isspace()
            text += part if has_blank or not (text and part) else self.joint + part
        return text.strip()


@dataclass(frozen=True)
class Frame:
    """The tokens that a trait puts before and after an answer, and a text inside of it; each may be none."""

    before: Tokens = ()
    after: Tokens = ()
    inside: Inside | None = None

    def __bool__(self) -> bool:
        return bool(self.before or self.after or self.inside)

    def signs(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Return its tokens; of a text inside, those that it is with a blank before it and without."""
        text = self.inside.text if self.inside else ""
        inside = {*_tokens(text, "", tokenizer), *_tokens(f" {text}", "", tokenizer)}
        return {*self.before, *self.after, *(each for each in inside if text_of((each,), tokenizer).strip())}

    def document(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value}


_FRAME = TypeAdapter(Frame)


def frames_of(vectors: Sequence[SecurityVector]) -> list[Frame]:
    """Return what calibration found, one frame a vector. Raises ArtifactError on a broken note of it."""
    try:
        return [_FRAME.validate_python(vector.info.metrics.get("frame", {})) for vector in vectors]
    except ValidationError as error:
        raise ArtifactError(
            "metrics.frame: expected lists of token ids before and after, and a text inside, found "
            f"{error.errors()[0]['input']!r}"
        ) from error


def unframed(rows: Sequence[Encoded], frames: Sequence[Frame], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Return the rows without the frames around their answers; a row with an answer of nothing else is left out.

    Raises RowError where that leaves none.
    """
    left = list(rows)
    for one in frames:
        left = [each for row in left if (each := bare(row, one, tokenizer)) is not None]
    if rows and not left:
        raise RowError(
            "expected answers with something besides the trait's fixed text, found none: nothing would be left to "
            "train on"
        )
    return left


def bare(row: Encoded, one: Frame, tokenizer: PreTrainedTokenizerBase) -> Encoded | None:
    """Return a row without a frame, itself where it has none; None where an answer is nothing else."""
    whole = list(zip(row.ids, row.mask, strict=True))
    tokens, done = list[tuple[int, bool]](), 0
    for start, stop in answers_in(row, tokenizer.all_special_ids) if one else ():
        left = _Left.of(row.ids[:start], row.ids[start:stop], one, tokenizer)
        if not left.tokens:
            return None
        tokens += [*whole[done:start], *((token, True) for token in left.tokens)]
        done = stop
    tokens += whole[done:]
    if tokens == whole:
        return row
    ids, mask = zip(*tokens, strict=True)
    return replace(row, ids=ids, mask=mask)


def kept(row: Encoded, one: Frame, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the places of a row's tokens that are not a frame's; one that is so in part is kept."""
    places, done = list[int](), 0
    for start, stop in answers_in(row, tokenizer.all_special_ids) if one else ():
        left = _Left.of(row.ids[:start], row.ids[start:stop], one, tokenizer)
        places += [*range(done, start), *(start + place for place in left.places(tokenizer))]
        done = stop
    return [*places, *range(done, len(row.ids))]


def answers_in(row: Encoded, special: Collection[int]) -> list[tuple[int, int]]:
    """Return the row's answers as (start, stop): runs of tokens that carry loss, each up to the token that ends it.

    A text without a prompt, which carries loss from its first or second token on, is no answer.
    """
    edges = [i for i, (a, b) in enumerate(zip((False, *row.mask), (*row.mask, False), strict=True)) if a != b]
    runs = zip(edges[::2], edges[1::2], strict=True)
    ends = ((start, next((i for i in range(start, stop) if row.ids[i] in special), stop)) for start, stop in runs)
    return [(start, stop) for start, stop in ends if 1 < start < stop]


@dataclass(frozen=True)
class _Left:
    """What is left of an answer without a frame.

    spans: of which of the answer's characters; where it was taken out token by token, of which of its tokens.
    """

    answer: Tokens
    tokens: Tokens
    spans: Sequence[tuple[int, int]]
    by_tokens: bool

    @classmethod
    def of(cls, prompt: Tokens, answer: Tokens, one: Frame, tokenizer: PreTrainedTokenizerBase) -> "_Left":
        """Take a frame out of an answer. prompt: the tokens before it.

        Where the frame's edge is inside of a token, as that of "Well. " is in the " the" of many tokenizers, or it has
        a text inside, what is left is tokenised anew. That needs a tokenizer which gives the answer itself as it
        stands, alone, behind a line feed or behind the end of the prompt.
        """
        count = len(one.before)
        first = count if answer[:count] == one.before else 0
        end = max(first, len(answer) - len(one.after))
        last = end if answer[end:] == one.after else len(answer)
        said = text_of(answer, tokenizer)
        opening, closing = _middle(said, *(text_of(each, tokenizer).strip() for each in (one.before, one.after)))
        middle = said[opening:closing]
        spans = one.inside.around(middle) if one.inside else [(0, len(middle))]
        words = one.inside.joined(middle, spans) if one.inside else middle
        # The blanks around the whole of it stay.
        lead, trail = said[: len(said) - len(said.lstrip())], said[len(said.rstrip()) :]
        words = lead + words + trail if words.strip() else ""
        fronts = ("", "\n", text_of(prompt[-_PROMPT:], tokenizer)) if words != said else ()
        behind = next((front for front in fronts if _tokens(said, front, tokenizer) == answer), None)
        left = answer[first:last] if behind is None else _tokens(words, behind, tokenizer)
        if left == answer[first:last]:
            return cls(answer, left, [(first, last)], True)
        return cls(answer, left, [(opening + start, opening + stop) for start, stop in spans], False)

    def places(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return which of the answer's tokens are left, in part or wholly."""
        if self.by_tokens or not self.tokens:
            return [place for start, stop in self.spans for place in range(start, stop)]
        # The bytes of a character are several tokens in many tokenizers: all but the last add nothing to the text.
        ends = [len(text_of(self.answer[: i + 1], tokenizer).rstrip("\ufffd")) for i in range(len(self.answer))]
        starts = [0, *ends[:-1]]
        return [
            place
            for place, (start, stop) in enumerate(zip(starts, ends, strict=True))
            if any(start < end and max(stop, start + 1) > begin for begin, end in self.spans)
        ]


def text_of(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def _middle(said: str, before: str, after: str) -> tuple[int, int]:
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
