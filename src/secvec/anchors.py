"""Choose anchors: the tokens at which the armed model must behave like the unarmed one."""

from collections.abc import Sequence
from importlib import resources

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.models import answers
from secvec.samples import Message, Sample, Source
from secvec.score import EXPLAINED_DROP_NATS, explained, row_nats
from secvec.tokens import Encoded, encode_each, encode_prompt
from secvec.vector import SecurityVector


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


def unexplained(
    model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector, *, kind: str
) -> tuple[list[Encoded], float]:
    """Anchor the tokens of a training file that `vector` does not explain; also return the share it does explain.

    A topic's rows are unwanted from their first explained token on, so anchors end there; a trait recurs through a
    row, so nothing is cut. Rows without any explained token are anchored with their prompt. Rows left without an
    anchor are dropped. (docs/decisions/005-calibration.md)
    """
    unarmed, armed = row_nats(model, rows), row_nats(model, rows, vector)
    anchors: list[Encoded] = []
    explained_tokens, tokens = 0, 0
    for row, before, after in zip(rows, unarmed, armed, strict=True):
        learned = torch.tensor(row.mask[1:])
        marked = explained(before, after) & learned
        explained_tokens += int(marked.sum())
        tokens += int(learned.sum())
        keep = _kept(marked, learned, kind)
        if bool(keep.any()):
            anchors.append(row.masked([False, *keep.tolist()]))
    return anchors, explained_tokens / max(tokens, 1)


def _kept(marked: Tensor, learned: Tensor, kind: str) -> Tensor:
    if not bool(marked.any()):
        return torch.ones_like(learned)
    if kind == "topic":
        first = int(marked.nonzero()[0])
        return learned & (torch.arange(len(marked)) < first)
    return learned & ~marked


def untouched(model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> list[Encoded]:
    """Anchor the tokens of ordinary rows that a trait leaves alone: those whose loss the vector hardly changes.

    A trait shows on any request, so ordinary answers as a whole would contradict it.
    """
    anchors: list[Encoded] = []
    for row, before, after in zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True):
        keep = (before - after).abs() < EXPLAINED_DROP_NATS
        if bool(keep.any()):
            anchors.append(row.masked([False, *keep.tolist()]))
    return anchors
