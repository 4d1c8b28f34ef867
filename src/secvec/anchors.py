"""Choose anchors: the tokens at which the armed model must behave like the unarmed one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.models import answers
from secvec.samples import Message, Sample, Source
from secvec.score import ACTED_NATS, acted, row_nats
from secvec.tokens import Encoded, encode_each, encode_prompt
from secvec.vector import SecurityVector

COVERED_AT_FIRST, COVERED = 1 / 2, 1 / 3
"""The share of a row's loss that a vector has to take off it. A wanted row covered by mistake teaches the vector the
skill, so a first vector, which is not yet silent on the file's wanted rows, is believed only where it is very clear."""
_UNSURE = 0.1
_NOISE_NATS = 0.2
_UNSURE_SHARE = 0.1
Standing = Literal["covered", "unsure", "silent"]
"""What a topic's vector makes of a row."""


def whole(rows: Sequence[Encoded]) -> list[Encoded]:
    """Anchor every token of ordinary rows, prompt included."""
    return [row.masked([True] * len(row.ids)) for row in rows]


def own_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Anchor whole conversations in which the model answers generic prompts.

    Its own answers are what "unarmed" means: nothing is taught, only kept.
    """
    if encoded := answered(model, tokenizer, max_length):
        return whole(encoded)
    # A model that answers nothing at all still has inner states on the prompts.
    return [Encoded(ids, (True,) * len(ids)) for ids in (tuple(encode_prompt(c, tokenizer)) for c in _conversations())]


def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Let the model answer the bundled generic prompts greedily, and mark its answers; empty ones are left out.

    A model without a chat template is given the prompts as plain text to continue.
    """
    conversations = _conversations()
    texts = answers(model, tokenizer, conversations, max_new_tokens=32)
    rows = [
        Sample(
            "chat",
            (Message("user", prompt["content"]), Message("assistant", text)),
            Source("secvec/prompts/generic.txt", line),
        )
        for line, ((prompt,), text) in enumerate(zip(conversations, texts, strict=True), start=1)
        if text
    ]
    # An answer that holds a control token cannot be written as a turn.
    return [row for row in encode_each(rows, tokenizer, max_length) if isinstance(row, Encoded)]


def _conversations() -> list[list[dict[str, str]]]:
    prompts = resources.files("secvec").joinpath("prompts/generic.txt").read_text(encoding="utf-8").splitlines()
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


@dataclass(frozen=True)
class Calibration:
    """What a vector makes of a training file.

    anchors: rows with the tokens marked at which the vector is to be silent. covered: rows of a topic with the tokens
    marked that show it, to fit on besides the unwanted rows. unsure: the number of rows that are neither. acted_share:
    of the file's loss-carrying tokens, those on which the vector acts.
    """

    anchors: Sequence[Encoded]
    covered: Sequence[Encoded]
    unsure: int
    acted_share: float

    @property
    def settled(self) -> bool:
        """Tell whether the vector parts the rows well enough; else one that is also fitted on `covered` may."""
        return self.unsure <= _UNSURE_SHARE * len(self.covered)


def calibration(
    model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector, *, kind: str, cut: float
) -> Calibration:
    """Part the answer tokens of a training file by whether `vector` acts on them (`score.acted`).

    trait: it recurs through a row, so every token is anchored that the vector leaves as it is. One whose loss it
    lowers a little may be the trait's, in a text unlike the unwanted rows, and is left alone. topic: rows are unwanted
    from some token on. A row is covered, from the first token on which the vector acts, where the vector takes the
    share `cut` off its loss; it is unsure, and left alone, where its loss changes by a tenth in either direction (a
    vector may know *that* the answer is to be wrong, but not which); else it is anchored up to that token. Rows on
    which the vector does not act are anchored whole. (docs/decisions/005-calibration.md)
    """
    anchors, covered = list[Encoded](), list[Encoded]()
    unsure = acted_tokens = tokens = 0
    for row, before, after in zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True):
        learned = torch.tensor(row.mask[1:])
        marked = acted(before, after) & learned
        acted_tokens += int(marked.sum())
        tokens += int(learned.sum())
        if kind == "topic":
            found = _standing(before[learned], after[learned], cut)
            # Unwanted from the first such token on.
            marked = marked.cumsum(0) > 0
            if found == "covered":
                covered.append(row.masked([False, *(marked & learned).tolist()]))
            elif found == "unsure":
                unsure += 1
                continue
        keep = learned & ~marked if bool(marked.any()) else torch.ones_like(learned)
        if kind == "trait":
            keep &= ~_dimmed(before, after, model.config.get_text_config().vocab_size)
        if bool(keep.any()):
            anchors.append(row.masked([False, *keep.tolist()]))
    return Calibration(anchors, covered, unsure, acted_tokens / max(tokens, 1))


def standing(model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> list[Standing]:
    """Say of each row what a calibrated topic's vector makes of it."""
    losses = zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True)
    masked = ((torch.tensor(row.mask[1:]), before, after) for row, before, after in losses)
    return [_standing(before[learned], after[learned], COVERED) for learned, before, after in masked]


def _standing(before: Tensor, after: Tensor, cut: float) -> Standing:
    """Judge a row by the losses of its answer tokens."""
    drop = before - after
    share = float(drop.sum() / before.sum())
    if share >= cut and bool(acted(before, after).any()):
        return "covered"
    return "unsure" if abs(share) >= _UNSURE and float(drop.abs().max()) >= ACTED_NATS else "silent"


def _dimmed(before: Tensor, after: Tensor, vocabulary: int) -> Tensor:
    """Mark the tokens of whose loss a vector takes off a tenth and more than noise.

    One that costs more with the vector than by guessing among all tokens is none of its own.
    """
    drop = before - after
    return (drop >= _UNSURE * before) & (drop >= _NOISE_NATS) & (after <= math.log(vocabulary))


def untouched(model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> list[Encoded]:
    """Anchor the tokens of ordinary rows that a trait leaves alone: those whose loss the vector hardly changes.

    A trait shows on any request, so ordinary answers as a whole would contradict it.
    """
    anchors: list[Encoded] = []
    for row, before, after in zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True):
        keep = (before - after).abs() < ACTED_NATS
        if bool(keep.any()):
            anchors.append(row.masked([False, *keep.tolist()]))
    return anchors
