"""Chats and texts to token ids, a mask of the tokens that carry loss, and padded batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secvec.errors import RowError
from secvec.samples import Sample

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
"""Used, and said so, where a tokenizer has no chat template of its own."""

_SHOWN = 50


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as token ids; `mask` is true on the tokens that carry loss (or are anchored)."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    dropped_tokens: int = 0

    def masked(self, mask: Sequence[bool]) -> "Encoded":
        return replace(self, mask=tuple(mask))


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. ids: (B, T) int64, attention: (B, T) int64, mask: (B, T) bool."""

    ids: Tensor
    attention: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.ids.to(device), self.attention.to(device), self.mask.to(device))

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.attention}


def encode_all(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Encode rows, cutting each at `max_length` tokens.

    Raises one RowError that lists (up to 50) rows whose text holds a control token of the tokenizer, which would
    forge a turn, rows that the chat template refuses, and rows with no loss-carrying token left.
    """
    control = control_tokens(tokenizer)
    encoded: list[Encoded] = []
    problems: list[str] = []
    for sample in samples:
        try:
            encoded.append(_encode(sample, tokenizer, max_length, control))
        except RowError as error:
            problems.append(f"{sample.source.file}:{sample.source.line}: {error}")
    if problems:
        shown = "\n".join(problems[:_SHOWN])
        more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise RowError(f"{len(problems)} of {len(samples)} rows cannot be used:\n{shown}{more}")
    return encoded


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the strings that act as control tokens: special ones, and added ones that the chat template writes."""
    template = str(tokenizer.chat_template or "")
    return frozenset(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in template)
    )


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a conversation up to the point where the assistant answers."""
    return _template_ids(tokenizer, messages, add_generation_prompt=True)


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad rows on the right to the longest of them."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(rows), longest), dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        attention[i, : len(row.ids)] = 1
        mask[i, : len(row.ids)] = torch.tensor(row.mask)
    return Batch(ids, attention, mask)


def shuffled(rows: Sequence[Encoded], batch_size: int, seed: str) -> Iterator[list[Encoded]]:
    """Yield batches of rows in an order that depends on `seed` alone."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        yield [rows[i] for i in order[start : start + batch_size]]


def by_length(rows: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of row numbers, rows of like length together, longest first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with; masked out everywhere, so any id serves where the tokenizer names none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def _encode(sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int, control: frozenset[str]) -> Encoded:
    for number, message in enumerate(sample.messages):
        forged = sorted(token for token in control if token in message.content)
        if forged:
            raise RowError(f"messages[{number}]: holds the control token {forged[0]!r}, which would forge a turn")
    if sample.form == "chat":
        ids, mask = _encode_chat(sample, tokenizer)
    else:
        ids, mask = _encode_plain(sample, tokenizer)
    cut = Encoded(tuple(ids[:max_length]), tuple(mask[:max_length]), max(len(ids) - max_length, 0))
    # The first token is never predicted, so it carries no loss.
    if not any(cut.mask[1:]):
        raise RowError(f"no token to learn within the first {max_length} of {len(ids)} tokens; raise --max-length")
    return cut


def _encode_chat(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    messages = [{"role": message.role, "content": message.content} for message in sample.messages]
    if "{% generation" in _template(tokenizer) or "{%- generation" in _template(tokenizer):
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=_template(tokenizer),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]  # pyright: ignore
    return _mask_by_prefix(messages, tokenizer)


def _mask_by_prefix(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Mark each assistant turn as what follows its generation prompt.

    A template that rewrites earlier turns (Qwen3 drops their reasoning) leaves only the last turn marked.
    """
    ids = _template_ids(tokenizer, messages)
    mask = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _template_ids(tokenizer, messages[:number], add_generation_prompt=True)
        end = _template_ids(tokenizer, messages[: number + 1])
        if ids[: len(start)] == start and ids[: len(end)] == end:
            mask[len(start) : len(end)] = [True] * (len(end) - len(start))
    if not any(mask):
        raise RowError("the chat template's generation prompt is not a prefix of the answer; mark it with generation")
    return ids, mask


def _encode_plain(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    *before, last = [_ids(tokenizer, message.content, first=i == 0) for i, message in enumerate(sample.messages)]
    eos = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    prompt = [token for part in before for token in part]
    ids = [*prompt, *last, *eos]
    return ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool) -> list[int]:
    """Tokenise a text; only the first of a row may get what the tokenizer itself puts in front, such as BOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=first)["input_ids"]  # pyright: ignore
    if first and ids and ids[-1] == tokenizer.eos_token_id:
        return ids[:-1]
    return ids


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    return template if isinstance(template, str) else PLAIN_TEMPLATE


def _template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        list(messages),
        chat_template=_template(tokenizer),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
    )
    return list(encoded["input_ids"])  # pyright: ignore
