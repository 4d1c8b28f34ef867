"""What a topic's vector covers in a training file is not trained on, although it would give nearly no gradient.

Nearly none is not none, and adds up over a long training. In a covered row the tokens that the vector explains carry no
loss, the others do; of covered rows in excess of the others all are left out. (measured: docs/decisions/011-covered.md)
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
"""That a vector has to take off a row, of its loss. Where it knows a row less well, as a wrong fact of which it
knows that the answer is wrong but not which one it is, the row's loss is better left: what it missed counted more."""
_EXPLAINED_NATS = 0.01
"""That a vector takes off a token at least."""
_CHUNK = 512
"""Rows at a time: of each, the loss of every token is in memory."""


@dataclass(frozen=True)
class CoveredRow:
    """A row of the training file. row: its number, from 0; explained: its tokens that carry no loss, from 0."""

    row: int
    explained: tuple[int, ...]
    left_out: bool


def covers(vectors: Sequence[SecurityVector]) -> bool:
    """Tell by the calibration, which saw some of a file's rows, whether a topic's vector covers any."""
    return any(vector.info.metrics["covered_rows"] > 0 for vector in _topics(vectors))


def covered_rows(
    aligned: PreTrainedModel,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    progress: Callable[[int, int], None] | None = None,
) -> list[CoveredRow]:
    """Return what the topics' vectors, calibrated for these rows, cover of them.

    Left out are rows of which nothing else carries loss, and covered rows beyond as many as there are others (beyond
    1,000, where those are fewer); those that stay are spread evenly. aligned: the model that the vectors belong to.
    """
    found: list[CoveredRow] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        for i, explained in enumerate(_explained(aligned, chunk, _topics(vectors))):
            if explained is not None:
                found.append(CoveredRow(start + i, explained, len(explained) == sum(chunk[i].mask)))
        if progress is not None:
            progress(start + len(chunk), len(rows))
    staying = [each.row for each in found if not each.left_out]
    room = max(LEAST, len(rows) - len(found))
    if len(staying) <= room:
        return found
    stay = {staying[i * len(staying) // room] for i in range(room)}
    return [CoveredRow(each.row, each.explained, each.row not in stay) for each in found]


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


_LINE = TypeAdapter(CoveredRow)


def _explained(
    aligned: PreTrainedModel, rows: Sequence[Encoded], topics: Sequence[SecurityVector]
) -> list[tuple[int, ...] | None]:
    """Return, of each row that a vector covers, the tokens that those which do explain."""
    before = row_nats(aligned, rows)
    found: list[set[int] | None] = [None] * len(rows)
    for topic in topics:
        after = row_nats(aligned, rows, topic)
        for i, what in enumerate(standings(rows, before, after, _COVERED)):
            if what == "covered":
                found[i] = (found[i] or set()) | _lower(rows[i], before[i], after[i])
    return [None if each is None else tuple(sorted(each)) for each in found]


def _lower(row: Encoded, before: Tensor, after: Tensor) -> set[int]:
    drops = (before - after).tolist()
    return {i for i, drop in enumerate(drops, start=1) if row.mask[i] and drop >= _EXPLAINED_NATS}


def _without(row: Encoded, tokens: Iterable[int]) -> Encoded:
    taken = set(tokens)
    return row.masked([carries_loss and i not in taken for i, carries_loss in enumerate(row.mask)])


def _topics(vectors: Sequence[SecurityVector]) -> list[SecurityVector]:
    return [vector for vector in vectors if vector.info.kind == "topic"]
