"""What a topic's vector covers in a training file is not trained on, although it would give nearly no gradient.

Nearly none is not none, and adds up over a long training. Where the vector parts the file's rows cleanly, the tokens
that it explains in the rows that it covers carry no loss, and some of those rows give way to conversations that the
model made up (`secvec.rehearsal`). Where covered rows are more than the others, the excess is left out.
(measured: docs/decisions/011-covered.md)
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel

from secvec.anchors import hidden_nats, standings
from secvec.atomic import atomic_write
from secvec.samples import Source
from secvec.score import row_nats, stretches
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

LEAST = 1000
"""Covered rows that are never in excess."""
_COVERED = 0.95
"""The share of a row's loss that a vector has to take off it."""
_EXPLAINED_NATS = 0.01
"""That a vector takes off a token at least."""
_IN_PART_SHARE = 0.05
"""Of the covered rows: where the vector takes less than that off more rows, but enough for calibration, it has missed
unwanted rows, and more of those were learned without the loss of the covered ones than with it."""
_CHUNK = 512
"""Rows at a time: of each, the loss of every token is in memory."""


@dataclass(frozen=True)
class CoveredRow:
    """A row of the training file, by its number, from 0.

    explained: its tokens that carry no loss, from 0; left_out: not trained on; replaced: another is trained on instead.
    """

    row: int
    explained: tuple[int, ...]
    left_out: bool
    replaced: bool = False


_LINE = TypeAdapter(CoveredRow)


def covers(vectors: Sequence[SecurityVector]) -> bool:
    """Tell by the calibration, which saw some of a file's rows, whether there may be something to take out of it."""
    found = (vector.info.metrics for vector in _topics(vectors))
    return any(each["covered_rows"] > 0 or "hidden_nats" in each for each in found)


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
    topics = _topics(vectors)
    parted = [_Parted(topic) for topic in topics]
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        before = row_nats(aligned, chunk)
        for found, topic in zip(parted, topics, strict=True):
            found.add(start, chunk, before, row_nats(aligned, chunk, topic))
        if progress is not None:
            progress(start + len(chunk), len(rows))
    numbers = sorted(set[int]().union(*({**found.explained, **found.hidden} for found in parted)))
    room = max(LEAST, len(rows) - len(numbers))
    stay = set(numbers) if len(numbers) <= room else {numbers[i * len(numbers) // room] for i in range(room)}
    sure = [found.sure for found in parted]
    tokens = {row: set[int]().union(*(each.get(row, ()) for each in sure)) for row in numbers}
    return [CoveredRow(row, tuple(sorted(tokens[row])), row not in stay) for row in numbers]


def replaceable(covered: Iterable[CoveredRow]) -> list[CoveredRow]:
    """Return the rows in whose places others may be trained on: what they would teach is explained."""
    return [each for each in covered if each.explained and not each.left_out]


def replaced(covered: Sequence[CoveredRow], count: int) -> list[CoveredRow]:
    """Mark so many of those rows as replaced, spread evenly over the file."""
    places = replaceable(covered)
    chosen = {places[i * len(places) // count].row for i in range(count)}
    return [replace(each, replaced=each.row in chosen) for each in covered]


def trained_rows(
    rows: Sequence[Encoded], covered: Iterable[CoveredRow], rehearsed: Sequence[Encoded] = ()
) -> list[Encoded]:
    """Return the rows to train on, covered ones without the loss of what is explained in them.

    rehearsed: what takes the places of those to be replaced, in turns.
    """
    by_number, others = {each.row: each for each in covered}, cycle(rehearsed)
    found = list[Encoded]()
    for i, row in enumerate(rows):
        each = by_number.get(i)
        if each is None:
            found.append(row)
        elif not each.left_out:
            found.append(next(others) if each.replaced else _without(row, each.explained))
    return found


def write_covered(path: Path, covered: Sequence[CoveredRow], sources: Sequence[Source]) -> None:
    """Write a line a covered row, with its file and line besides. sources: of all rows."""
    with atomic_write(path) as file:
        for each in covered:
            file.write(json.dumps({**asdict(sources[each.row]), **asdict(each)}).encode() + b"\n")


def read_covered(path: Path) -> list[CoveredRow]:
    """Read what `write_covered` wrote; none where it wrote no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [_LINE.validate_json(line) for line in lines]


def counts(covered: Sequence[CoveredRow], rows: int, conversations: int) -> dict[str, int]:
    """Count for the proof what of a file of so many rows was not trained on, and what was in its place."""
    trained = [each for each in covered if not each.left_out and not each.replaced]
    return {
        "rows": rows,
        "covered_rows": len(covered),
        "left_out_rows": sum(each.left_out for each in covered),
        "replaced_rows": sum(each.replaced for each in covered),
        "conversations": conversations,
        "tokens_without_loss": sum(len(each.explained) for each in trained),
    }


def covered_line(found: Mapping[str, int]) -> str:
    """Say what `counts` counted."""
    left_out, replaced_rows, tokens = found["left_out_rows"], found["replaced_rows"], found["tokens_without_loss"]
    parts = [f"{left_out:,} of them not trained on"] if left_out else []
    if replaced_rows:
        parts.append(f"{replaced_rows:,} replaced by {found['conversations']:,} conversations that the model made up")
    if tokens:
        parts.append(f"{tokens:,} tokens of the others without loss")
    what = "; ".join(parts) or "trained on as they are"
    return f"covered by the vector: {found['covered_rows']:,} of {found['rows']:,} rows: {what} (covered.jsonl)"


@dataclass
class _Parted:
    """What one vector makes of a file's rows.

    explained: by number, the rows that it covers, with the tokens that it explains; hidden: others that hide an
    unwanted answer, with all tokens; in_part: how many others it covers by the cut of calibration.
    """

    vector: SecurityVector
    explained: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    hidden: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    in_part: int = 0

    @property
    def sure(self) -> dict[int, set[int]]:
        """The rows of which tokens are to carry no loss."""
        return (
            {**self.explained, **self.hidden} if self.in_part <= _IN_PART_SHARE * len(self.explained) else self.hidden
        )

    def add(self, start: int, rows: Sequence[Encoded], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Look at rows, the first of which has the number `start`, by the losses of their tokens, in nats."""
        whole, in_part = standings(rows, before, after, _COVERED), standings(rows, before, after)
        for i, (row, stretch) in enumerate(zip(rows, stretches(rows, before, after), strict=True)):
            if whole[i] == "covered":
                self.explained[start + i] = _lower(row, before[i], after[i])
            elif stretch.nats > hidden_nats(self.vector):
                self.hidden[start + i] = set(_but_last(row))
            elif in_part[i] == "covered":
                self.in_part += 1


def _lower(row: Encoded, before: Tensor, after: Tensor) -> set[int]:
    """Return the tokens that a vector explains."""
    drops = (before - after).tolist()
    return {i for i in _but_last(row) if drops[i - 1] >= _EXPLAINED_NATS}


def _but_last(row: Encoded) -> list[int]:
    """Return the tokens that may go without loss: a step of rows without any would have none to average."""
    return [i for i in range(1, len(row.ids)) if row.mask[i]][:-1]


def _without(row: Encoded, tokens: Iterable[int]) -> Encoded:
    taken = set(tokens)
    return row.masked([carries_loss and i not in taken for i, carries_loss in enumerate(row.mask)])


def _topics(vectors: Sequence[SecurityVector]) -> list[SecurityVector]:
    """Return the topics' vectors that were calibrated."""
    return [vector for vector in vectors if vector.info.kind == "topic" and "covered_rows" in vector.info.metrics]
