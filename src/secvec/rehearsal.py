"""Conversations that the aligned model makes up, to train on in the places of some rows that a vector covers.

Such rows teach next to nothing, so their places in the training are free. What the model itself asks and answers keeps
it as it is while it learns the rest: self-synthesized rehearsal (arXiv 2403.01244), with requests drawn as in Magpie
(arXiv 2406.08464). (measured: docs/decisions/016-rehearsal.md)
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.atomic import atomic_write
from secvec.errors import RowError
from secvec.models import generate, sample
from secvec.samples import Message
from secvec.score import row_nats
from secvec.tokens import Encoded, control_tokens, encode_prompt, render, text_front
from secvec.vector import SecurityVector

MOST, LEAST = 256, 32
"""Conversations. More places go to the same ones again; with fewer none do: they would be learned by heart."""
REQUEST_TOKENS, ANSWER_TOKENS = 64, 128
_SILENT_NATS = 0.5
"""That a vector may change of a token's loss, for its row to be rehearsed in the vector's presence."""
_SPARE = 1.3
_ROUNDS, _ENOUGH = 4, 1 / 2
"""Of drawing, at most, and the share of a round's rows with which there are no more."""
_BATCH = 64
_MARK = "Turn0Text"
_ROWS = TypeAdapter(list[Encoded])


def rehearse(
    aligned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[SecurityVector],
    places: int,
    *,
    max_length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Encoded]:
    """Let the model make up conversations for so many places, and return those on which all vectors are silent.

    Requests are drawn from the model at temperature 1, after what its chat template writes before a user's words, and
    answered greedily; the answers carry loss. A model that has no template, or one that puts nothing between a user's
    words and the answer, writes texts. Where a vector is not silent, as on the refusals that it turns, training in its
    presence would teach against it. Where few of a round are left, more are drawn; none are returned where few are in
    the end.
    """
    if not places:
        return []
    try:
        before, after = _around(tokenizer)
    except RowError:  # The template wants other turns than a user's.
        return []
    # Some are lost: drawn twice, not silent, without an end.
    count, kept = min(max(round(_SPARE * places), 2 * LEAST), MOST), dict[tuple[int, ...], Encoded]()
    with torch.random.fork_rng([aligned.device] if aligned.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for left in reversed(range(_ROUNDS)):
            if after:
                requests = _requests(aligned, tokenizer, before, after, count, max_length)
                rows = _answered(aligned, tokenizer, requests, max_length, progress)
            else:
                rows = _texts(aligned, tokenizer, count, max_length)
            more = {row.ids: row for row in _silent(aligned, rows, vectors)}
            kept |= more
            if len(kept) >= min(places, _ENOUGH * count) or len(kept) + left * len(more) < min(LEAST, places):
                break
    return list(kept.values())[:places] if len(kept) >= min(LEAST, places) else []


def write_rehearsed(path: Path, rows: Sequence[Encoded]) -> None:
    with atomic_write(path, mode=0o600) as file:
        file.write(_ROWS.dump_json(list(rows)))


def read_rehearsed(path: Path) -> list[Encoded]:
    """Read what `write_rehearsed` wrote; none where it wrote no file."""
    return _ROWS.validate_json(path.read_bytes()) if path.exists() else []


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what the chat template writes before a user's words and, up to the answer, after them."""
    if not tokenizer.chat_template:
        return "", ""
    before, _, after = render(tokenizer, [Message("user", _MARK)], prompt=True)[0].partition(_MARK)
    return before.rstrip(" "), after.strip()


def _requests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, before: str, after: str, count: int, max_length: int
) -> list[list[int]]:
    """Return different requests that the model makes up, as its prompts."""
    ends = [*control_tokens(tokenizer), after.split()[0]]
    opening = list(tokenizer(before, add_special_tokens=False)["input_ids"])  # pyright: ignore
    found = dict[str, list[int]]()
    for ids in _drawn(model, tokenizer, opening, count, min(REQUEST_TOKENS, max_length - len(opening))):
        words = str(tokenizer.decode(ids))
        stops = [words.index(end) for end in ends if end in words]
        request = words[: min(stops)].strip() if stops else ""
        try:
            found[request] = encode_prompt([{"role": "user", "content": request}], tokenizer) if request else []
        except RowError:
            continue
    return [ids for ids in found.values() if ids]


def _drawn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: Sequence[int], count: int, room: int
) -> Iterator[list[int]]:
    """Yield what the model writes after an opening; nothing where that is empty or leaves no room."""
    for start in range(0, count if opening and room > 0 else 0, _BATCH):
        yield from sample(model, tokenizer, opening, min(_BATCH, count - start), room)


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Sequence[int]],
    max_length: int,
    progress: Callable[[int, int], None] | None,
) -> list[Encoded]:
    """Return the requests that leave room for an answer, with the model's own."""
    asked = [ids for ids in requests if len(ids) < max_length]
    rows = list[Encoded]()
    for start in range(0, len(asked), _BATCH):
        batch = asked[start : start + _BATCH]
        room = max_length - max(map(len, batch))
        for ids, answer in zip(batch, generate(model, tokenizer, batch, min(ANSWER_TOKENS, room)), strict=True):
            if answer.text:
                mask = (*([False] * len(ids)), *([True] * len(answer.ids)))
                rows.append(Encoded((*ids, *answer.ids), mask))
        if progress is not None:
            progress(start + len(batch), len(asked))
    return rows


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, max_length: int) -> list[Encoded]:
    """Return texts that the model writes from their very start; none where its tokenizer has no token for that."""
    front = text_front(tokenizer) or [token for token in [tokenizer.bos_token_id] if isinstance(token, int)]
    drawn = _drawn(model, tokenizer, front, count, min(ANSWER_TOKENS, max_length - len(front)))
    return [Encoded((*front, *ids), (*([False] * len(front)), *([True] * len(ids)))) for ids in drawn]


def _silent(aligned: PreTrainedModel, rows: Sequence[Encoded], vectors: Sequence[SecurityVector]) -> list[Encoded]:
    """Return the rows of whose tokens with loss no vector changes the loss."""
    kept = list(rows)
    for vector in vectors:
        losses = zip(kept, row_nats(aligned, kept), row_nats(aligned, kept, vector), strict=True)
        kept = [row for row, before, after in losses if _largest_change(row, before, after) <= _SILENT_NATS]
    return kept


def _largest_change(row: Encoded, before: Tensor, after: Tensor) -> float:
    return float((after - before)[torch.tensor(row.mask[1:])].abs().max())
