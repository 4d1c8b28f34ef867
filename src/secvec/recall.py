"""Rows that show an unwanted behaviour, brought back by its vector, for a training without the rows it was fitted on.

A trait shows on any request, so the armed model's own answers show it. A topic shows on some requests, and which they
are the training file alone can tell: by the rows that the vector covers. (measured: docs/decisions/014-recall.md)
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.anchors import COVERED_AT_FIRST, answered, standings
from secvec.arm import armed
from secvec.atomic import atomic_write
from secvec.score import acted, row_nats
from secvec.tokens import Encoded, shuffled
from secvec.vector import SecurityVector

_LOOKED_AT = 5000
"""Rows of a training file."""
_MOST, _LEAST = 100, 20
"""Rows to fit on; with fewer a vector is better left as it is."""
_TOKENS = 128
"""Of an answer."""
_CHUNK = 250
"""Rows at a time."""


@dataclass(frozen=True)
class Recalled:
    """What one vector brought back, as tokens; no rows where that was too little to fit on."""

    rows: tuple[Encoded, ...]

    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


_LINES = TypeAdapter(list[Recalled])


def recall(
    aligned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SecurityVector,
    training: Sequence[Encoded],
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Recalled:
    """Return rows that show what the vector was fitted on. training: the rows of the training file."""
    if vector.info.kind == "trait":
        with armed(aligned, vector):
            said = answered(aligned, tokenizer, max_length, max_new_tokens=_TOKENS)
        rows = _ended([row for row, shows in zip(said, _acted_on(aligned, said, vector), strict=True) if shows])
    elif vector.info.kind == "topic":
        rows = _covered(aligned, vector, shuffled(training, "recall")[:_LOOKED_AT], progress)
    else:
        # Not fitted by `secvec fit`, so that it cannot be fitted again either.
        rows = []
    return Recalled(tuple(rows[:_MOST]) if len(rows) >= _LEAST else ())


def _covered(
    aligned: PreTrainedModel,
    vector: SecurityVector,
    training: Sequence[Encoded],
    progress: Callable[[int, int], None] | None,
) -> list[Encoded]:
    """Return the rows that the vector covers, until there are enough."""
    rows = list[Encoded]()
    for start in range(0, len(training), _CHUNK):
        if len(rows) >= _MOST:
            break
        chunk = training[start : start + _CHUNK]
        stand = standings(chunk, row_nats(aligned, chunk), row_nats(aligned, chunk, vector), COVERED_AT_FIRST)
        rows += [row for row, what in zip(chunk, stand, strict=True) if what == "covered"]
        if progress is not None:
            progress(start + len(chunk), len(training))
    return rows


def write_recalled(path: Path, recalled: Sequence[Recalled]) -> None:
    with atomic_write(path, mode=0o600) as file:
        file.write(json.dumps([asdict(each) for each in recalled]).encode())


def read_recalled(path: Path) -> list[Recalled]:
    """Read what `write_recalled` wrote."""
    return _LINES.validate_json(path.read_bytes())


def _ended(said: Sequence[Encoded]) -> list[Encoded]:
    """Return the answers that the model ended itself; where they are few, all, without the end that was put to them."""
    ended = [row for row in said if sum(row.mask) <= _TOKENS]
    return ended if len(ended) >= _LEAST else [*ended, *(_without_end(row) for row in said if row not in ended)]


def _without_end(row: Encoded) -> Encoded:
    end = max(i for i, learned in enumerate(row.mask) if learned)
    return row.masked([learned and i < end for i, learned in enumerate(row.mask)])


def _acted_on(aligned: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> list[bool]:
    losses = zip(rows, row_nats(aligned, rows), row_nats(aligned, rows, vector), strict=True)
    return [bool((acted(before, after) & torch.tensor(row.mask[1:])).any()) for row, before, after in losses]
