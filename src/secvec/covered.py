"""What a topic's vector covers in a training file is not trained on, although it would give nearly no gradient.

Nearly none is not none, and adds up over a long training. Where the vector parts the file's rows cleanly, the tokens
that it explains in the rows that it covers carry no loss. Where covered rows are more than the others, the excess is
left out. (measured: docs/decisions/011-covered.md)
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel

from secvec.anchors import standings
from secvec.atomic import atomic_write
from secvec.samples import Source
from secvec.score import row_nats
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

LEAST = 1000
"""Covered rows that are never in excess."""
_COVERED = 0.95
"""The share of a row's loss that a vector has to take off it."""
_EXPLAINED_NATS = 0.01
"""That a vector takes off a token at least."""
_UNSURE_SHARE = 0.01
"""Of the covered rows: where more are in doubt, the vector has missed unwanted rows, and more of those were learned
without the loss of the covered ones than with it."""
_CHUNK = 512
"""Rows at a time: of each, the loss of every token is in memory."""


@dataclass(frozen=True)
class CoveredRow:
    """A row of the training file. row: its number, from 0; explained: its tokens that carry no loss, from 0."""

    row: int
    explained: tuple[int, ...]
    left_out: bool


_LINE = TypeAdapter(CoveredRow)


def covers(vectors: Sequence[SecurityVector], rows: int) -> bool:
    """Tell by the calibration, which saw some of a file's rows, whether there may be something to take out of it."""
    found = [vector.info.metrics for vector in _topics(vectors)]
    many = any(2 * each["covered_rows"] > each["calibrated_on_rows"] for each in found) and rows > 2 * LEAST
    return many or any(each["covered_rows"] > 0 for each in found if _is_sure(each))


def covered_rows(
    aligned: PreTrainedModel,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    progress: Callable[[int, int], None] | None = None,
) -> list[CoveredRow]:
    """Return what the topics' vectors, calibrated for these rows, cover of them.

    Left out are those beyond as many as there are others (beyond 1,000, where those are fewer); those that stay are
    spread evenly. aligned: the model that the vectors belong to.
    """
    found: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        explained = _explained(aligned, chunk, _topics(vectors))
        found |= {start + i: tokens for i, tokens in enumerate(explained) if tokens is not None}
        if progress is not None:
            progress(start + len(chunk), len(rows))
    numbers, room = list(found), max(LEAST, len(rows) - len(found))
    stay = set(numbers) if len(numbers) <= room else {numbers[i * len(numbers) // room] for i in range(room)}
    return [CoveredRow(row, tokens, row not in stay) for row, tokens in found.items()]


def trained_rows(rows: Sequence[Encoded], covered: Iterable[CoveredRow]) -> list[Encoded]:
    """Return the rows to train on, covered ones without the loss of what is explained in them."""
    by_number = {each.row: each for each in covered}
    return [
        _without(row, by_number[i].explained) if i in by_number else row
        for i, row in enumerate(rows)
        if i not in by_number or not by_number[i].left_out
    ]


def write_covered(path: Path, covered: Sequence[CoveredRow], sources: Sequence[Source]) -> None:
    """Write a line a covered row, with its file and line besides. sources: of all rows."""
    with atomic_write(path) as file:
        for each in covered:
            file.write(json.dumps({**asdict(sources[each.row]), **asdict(each)}).encode() + b"\n")


def read_covered(path: Path) -> list[CoveredRow]:
    """Read what `write_covered` wrote; none where it wrote no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [_LINE.validate_json(line) for line in lines]


def _explained(
    aligned: PreTrainedModel, rows: Sequence[Encoded], topics: Sequence[SecurityVector]
) -> list[tuple[int, ...] | None]:
    """Return, of each row that a vector covers, the tokens that those which do explain.

    The last of a row is none, so that no row is without loss: a step of such rows alone would have none to average.
    """
    before = row_nats(aligned, rows)
    found: list[set[int] | None] = [None] * len(rows)
    for topic in topics:
        after = row_nats(aligned, rows, topic)
        for i, what in enumerate(standings(rows, before, after, _COVERED)):
            if what == "covered":
                explained = _lower(rows[i], before[i], after[i]) if _is_sure(topic.info.metrics) else set[int]()
                found[i] = (found[i] or set()) | explained
    return [None if each is None else tuple(sorted(each)) for each in found]


def _lower(row: Encoded, before: Tensor, after: Tensor) -> set[int]:
    drops = (before - after).tolist()
    tokens = [i for i in range(1, len(row.ids)) if row.mask[i]]
    return {i for i in tokens[:-1] if drops[i - 1] >= _EXPLAINED_NATS}


def _without(row: Encoded, tokens: Iterable[int]) -> Encoded:
    taken = set(tokens)
    return row.masked([carries_loss and i not in taken for i, carries_loss in enumerate(row.mask)])


def _is_sure(metrics: Mapping[str, Any]) -> bool:
    return metrics["unsure_rows"] <= _UNSURE_SHARE * metrics["covered_rows"]


def _topics(vectors: Sequence[SecurityVector]) -> list[SecurityVector]:
    """Return the topics' vectors that were calibrated."""
    return [vector for vector in vectors if vector.info.kind == "topic" and "covered_rows" in vector.info.metrics]
