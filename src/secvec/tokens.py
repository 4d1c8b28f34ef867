"""Chats and texts to token ids, a mask of the tokens that carry loss, and padded batches.

No row may forge a turn. Refused are a control token in a text, be it written out, made by the tokenizer's normaliser
or formed by two texts that meet; and, where a template marks turns in plain text, such a mark.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jinja2 import TemplateSyntaxError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from secvec.errors import InputError, RowError
from secvec.formats import ROLES, Message
from secvec.samples import Sample, summary

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + (eos_token or '') }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
"""Used, and said so, where a tokenizer has no chat template of its own."""

# Chats that show how a template writes turns; one that it refuses is left out.
_PROBES = (("system", "user", "assistant", "user", "assistant"), ("user", "assistant", "user"), ("developer", "user"))
_PLACEHOLDER = re.compile(r"Turn[0-9]Text")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_SHOWN_CHARACTERS = 20
_WINDOW = 4
"""Batches, among whose rows those of like length are put together."""
Span = tuple[int, int]
"""(start, end) of a piece of a text or of a token in it, in characters."""


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

    Raises one RowError that lists (up to 50) rows that would forge a turn, that the chat template refuses or changes,
    or that have no loss-carrying token left; InputError for a tokenizer that cannot be used.
    """
    rows = encode_each(samples, tokenizer, max_length)
    if problems := [str(row) for row in rows if isinstance(row, RowError)]:
        raise RowError(summary(problems, len(rows)))
    return [row for row in rows if isinstance(row, Encoded)]


def encode_each(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded | RowError]:
    """Encode rows as `encode_all` does, with the error that names file and line in the place of an unusable row."""
    turns = _Turns.of(tokenizer)
    rows: list[Encoded | RowError] = []
    for sample in samples:
        try:
            rows.append(_encode(sample, turns, max_length))
        except RowError as error:
            rows.append(RowError(f"{sample.source.file}:{sample.source.line}: {error}"))
    return rows


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the strings that act as control tokens: special ones, and added ones that the chat template writes.

    A token that only stands for the unknown is none: it opens and ends nothing, and ordinary texts hold "<unk>".
    """
    names = tokenizer.special_tokens_map
    unknown = {str(names.get("unk_token", ""))} - {str(value) for key, value in names.items() if key != "unk_token"}
    written = "\n".join([_template(tokenizer), *_probe(tokenizer)])
    return frozenset(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.content in written or (token.special and token.content not in unknown))
    )


def forgeries(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], tuple[re.Pattern[str], ...]]:
    """Return patterns of what would forge a turn: control tokens, in any text; the template's own marks, in a chat."""
    turns = _Turns.of(tokenizer)
    # Where there are no control tokens: what no text holds.
    return re.compile("|".join(map(re.escape, turns.control)) or r"(?!)"), turns.marks


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a conversation up to the point where the assistant answers.

    Raises RowError where a message would forge a turn, or where the chat template refuses or changes one.
    """
    turns = _Turns.of(tokenizer)
    return turns.encode([Message(message["role"], message["content"]) for message in messages], prompt=True).ids


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


def shuffled(rows: Sequence[Encoded], seed: str) -> list[Encoded]:
    """Return the rows in an order that depends on `seed` alone."""
    mixed = list(rows)
    random.Random(seed).shuffle(mixed)
    return mixed


def batches_alike(rows: Sequence[Encoded], batch_size: int, seed: str) -> list[list[Encoded]]:
    """Return batches of rows in an order that depends on `seed` alone, with little padding.

    Of every few batches' worth of shuffled rows, those of like length run together.
    """
    mixed, window = shuffled(rows, seed), _WINDOW * batch_size
    near = [sorted(mixed[i : i + window], key=lambda row: len(row.ids)) for i in range(0, len(mixed), window)]
    batches = [part[i : i + batch_size] for part in near for i in range(0, len(part), batch_size)]
    random.Random(seed).shuffle(batches)
    return batches


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with; masked out everywhere, so any id serves where the tokenizer names none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


@dataclass(frozen=True)
class _Text:
    """A text and its tokens. marked: what the chat template puts between generation marks, if it has any."""

    text: str
    ids: list[int]
    spans: list[Span]
    marked: list[Span]

    def mask(self, learned: Sequence[Span]) -> list[bool]:
        """Mark the tokens that hold a character of `learned`, also where one reaches over its edge."""
        mask: list[bool] = []
        end = 0
        for start, stop in self.spans:
            # Byte-level tokenizers may leave spaces out of spans: a token of nothing but spaces then has no width.
            start, end = (end, stop) if start == stop else (start, stop)
            mask.append(any(end > a and start < b for a, b in learned))
        return mask


@dataclass(frozen=True)
class _Turns:
    """How a tokenizer writes turns, and what would forge one.

    control, control_ids: its control tokens; marks: the plain texts that open a turn; outlines: those known so far.
    """

    tokenizer: PreTrainedTokenizerBase
    control: tuple[str, ...]
    control_ids: frozenset[int]
    marks: tuple[re.Pattern[str], ...]
    outlines: dict[Any, list[int]] = field(default_factory=dict[Any, list[int]])

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_Turns":
        if not tokenizer.is_fast:
            raise InputError(
                f"expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}, which does not say "
                "where its tokens are in a text; load it with AutoTokenizer and save_pretrained"
            )
        control = tuple(sorted(control_tokens(tokenizer), key=lambda token: (-len(token), token)))
        ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.content in control)
        return cls(tokenizer, control, ids, _marks(_probe(tokenizer), control))

    def encode(self, messages: Sequence[Message], *, prompt: bool = False) -> _Text:
        """Write messages through the chat template and tokenise them; prompt: up to where the assistant answers."""
        for number, message in enumerate(messages):
            if message.role not in ROLES:
                raise RowError(f"messages[{number}]: expected a role out of {', '.join(ROLES)}, found another")
            self.refuse_forged(message.content, f"messages[{number}]", self.marks)
        text, marked = render(self.tokenizer, messages, prompt=prompt)
        for number, message in enumerate(messages):
            if message.content.strip() not in text:
                raise RowError(f"messages[{number}]: the chat template leaves out or changes the {message.role}'s text")
        encoded = _tokenise(self.tokenizer, text, marked)
        if self.controls(encoded.ids) != self.outline(messages, prompt):
            raise RowError("messages: the tokenizer reads a control token in their text, which would forge a turn")
        return encoded

    def refuse_forged(self, text: str, where: str, marks: Sequence[re.Pattern[str]] = ()) -> None:
        if forged := next((token for token in self.control if token in text), None):
            raise RowError(f"{where}: holds the control token {forged!r}, which would forge a turn; take it out")
        if forged := next((found for mark in marks if (found := mark.search(text))), None):
            mark = forged[0].strip()
            raise RowError(f"{where}: holds {mark!r}, with which the chat template opens a turn; reword it")

    def controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control_ids]

    def outline(self, messages: Sequence[Message], prompt: bool) -> list[int]:
        """Return the control tokens that the template writes for turns like these, whatever they say."""
        key = prompt, tuple((message.role, bool(message.content.strip())) for message in messages)
        if key not in self.outlines:
            text, marked = render(self.tokenizer, _placeholders(*key[1]), prompt=prompt)
            self.outlines[key] = self.controls(_tokenise(self.tokenizer, text, marked).ids)
        return self.outlines[key]


def _placeholders(*turns: tuple[str, bool]) -> list[Message]:
    return [Message(role, f"Turn{i}Text" if filled else "") for i, (role, filled) in enumerate(turns)]


def _probe(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return example chats as the template writes them, with placeholders for what is said."""
    texts: list[str] = []
    for roles in _PROBES:
        try:
            texts.append(render(tokenizer, _placeholders(*((role, True) for role in roles)))[0])
        except RowError:
            continue
    return texts


def _marks(texts: Sequence[str], control: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """Return what opens turns in these chats by text alone, such as "### user" or "ASSISTANT:".

    That is the line before a message, unless it holds a control token, without which its words open nothing (ChatML).
    """
    patterns: set[str] = set()
    for number, piece in ((i, piece) for text in texts for i, piece in enumerate(_PLACEHOLDER.split(text)[:-1])):
        *before, line = piece.rstrip().split("\n")
        mark = line.strip()
        if len(mark) > 1 and not any(token in line for token in control):
            opening = r"^[ \t]*" if before or number == 0 else r"(?<!\w)"
            ending = r"[ \t\r]*$" if "\n" in piece[len(piece.rstrip()) :] else ""
            patterns.add(opening + re.escape(mark) + ending)
    return tuple(re.compile(pattern, re.MULTILINE) for pattern in sorted(patterns))


def _encode(sample: Sample, turns: _Turns, max_length: int) -> Encoded:
    ids, mask = _encode_chat(sample, turns) if sample.form == "chat" else _encode_plain(sample, turns)
    cut = Encoded(tuple(ids[:max_length]), tuple(mask[:max_length]), max(len(ids) - max_length, 0))
    # The first token is never predicted, so it carries no loss.
    if not any(mask[1:]):
        raise RowError("expected a token to learn after the first one, found none: the row is too short")
    if not any(cut.mask[1:]):
        raise RowError(
            f"no token to learn within the first {max_length} of {len(ids)} tokens; raise --max-length if the model "
            "takes more"
        )
    return cut


def _encode_chat(sample: Sample, turns: _Turns) -> tuple[list[int], list[bool]]:
    encoded = turns.encode(sample.messages)
    if _GENERATION.search(_template(turns.tokenizer)):
        learned = _with_end(encoded, turns.control)
    else:
        learned = _answers(sample.messages, encoded.text, turns)
    answer = sample.messages[-1].content.strip()
    if not any(answer in encoded.text[start:end] for start, end in learned):
        raise RowError(
            "the chat template does not show where the last answer is: its generation prompt is not what it writes "
            "before the answer; put the answer between {% generation %} and {% endgeneration %} in the template"
        )
    return encoded.ids, encoded.mask(learned)


def _with_end(encoded: _Text, control: tuple[str, ...]) -> list[Span]:
    """Return what is marked as generated, with the token that ends a turn where that stands just behind the mark.

    Behind the last turn stands no other turn's opening.
    """
    text = encoded.text
    end = next((token for token in control if encoded.marked and text.startswith(token, encoded.marked[-1][1])), "")
    return [
        (start, stop + len(end) if text.startswith(end, stop) and not text[start:stop].endswith(control) else stop)
        for start, stop in encoded.marked
    ]


def _answers(messages: Sequence[Message], text: str, turns: _Turns) -> list[Span]:
    """Find each assistant turn as what follows its generation prompt.

    A template that rewrites earlier turns (Qwen3 drops their reasoning) leaves only the last one to be found.
    """
    learned: list[Span] = []
    for number, message in enumerate(messages):
        if message.role != "assistant" or number == 0:
            continue
        before, _ = render(turns.tokenizer, messages[:number], prompt=True)
        until, _ = render(turns.tokenizer, messages[: number + 1])
        if until.startswith(before) and text.startswith(until):
            # What follows the end-of-turn token, often a newline, is not the assistant's.
            end = len(until.rstrip()) if until.rstrip().endswith(turns.control) else len(until)
            learned.append((len(before), end))
    return learned


def _encode_plain(sample: Sample, turns: _Turns) -> tuple[list[int], list[bool]]:
    """Tokenise the texts of a row as one text, so that it reads the same back, with BOS and EOS around it."""
    for message in sample.messages:
        turns.refuse_forged(message.content, message.role)
    start = sum(len(message.content) for message in sample.messages[:-1])
    encoded = _tokenise(turns.tokenizer, "".join(message.content for message in sample.messages))
    if turns.controls(encoded.ids):
        raise RowError("the tokenizer reads a control token in the text, which would forge an end; take it out")
    front, eos = text_front(turns.tokenizer), turns.tokenizer.eos_token_id
    back = [eos] if isinstance(eos, int) else []
    mask = encoded.mask([(start, len(encoded.text))])
    return [*front, *encoded.ids, *back], [*([False] * len(front)), *mask, *([True] * len(back))]


def text_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts in front of a text, such as BOS."""
    bare, whole = _tokenise(tokenizer, "a").ids, list(tokenizer("a")["input_ids"])  # pyright: ignore
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise InputError("the tokenizer has several chat templates, none of them named default; name one so")
        return str(template["default"])
    return template or PLAIN_TEMPLATE


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False
) -> tuple[str, list[Span]]:
    """Write messages through the chat template; also return what it marks as generated, as spans of characters."""
    template, write = _template(tokenizer), cast(Any, render_jinja_template)
    marks = bool(_GENERATION.search(template))
    try:
        texts, marked = write(
            conversations=[[{"role": message.role, "content": message.content} for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateSyntaxError as error:
        raise InputError(f"the tokenizer's chat template is not valid Jinja: {error.message}") from error
    except Exception as error:  # A template is code of others: any error of it is the row's.
        raise RowError(f"the chat template refuses the row: {_template_reason(error, messages)}") from error
    return texts[0], marked[0] if marks else []


def _template_reason(error: Exception, messages: Sequence[Message]) -> str:
    """Return what the template says, in one line, unless it quotes a message: rows may be harmful."""
    words = str(error).strip().split("\n", 1)[0][:200]
    parts = [words[i : i + _SHOWN_CHARACTERS + 1] for i in range(len(words) - _SHOWN_CHARACTERS)]
    quoted = any(part in message.content for part in parts for message in messages)
    return type(error).__name__ if quoted or not words else words


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, marked: Sequence[Span] = ()) -> _Text:
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return _Text(text, list(encoded["input_ids"]), list(encoded["offset_mapping"]), list(marked))
