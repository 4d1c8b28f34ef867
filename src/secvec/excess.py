"""Covered rows that are more than the others: all but as many are left out of a training.

A row that a topic's vector covers gives nearly no gradient while the vector is in effect, so nothing is lost with it;
but what little a hundred thousand of them give adds up. (measured: docs/decisions/011-excess.md)
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from secvec.anchors import standing
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

LEAST = 1000
"""Covered rows that are never too many."""
_CHUNK = 4096
"""Rows at a time: of each, the loss of every token is in memory."""


def may_exceed(vectors: Sequence[SecurityVector], rows: int) -> bool:
    """Tell by the calibration, which saw some of a file's rows, whether most of its rows may be covered ones."""
    seen = min((int(vector.info.fit["calibration_rows"]) for vector in vectors), default=0)
    covered = sum(int(vector.info.metrics["covered_rows"]) for vector in _topics(vectors))
    return rows > 2 * LEAST and 2 * covered > min(seen, rows)


def in_excess(
    aligned: PreTrainedModel,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Return the numbers of the covered rows beyond as many as there are others (beyond 1,000, where those are fewer).

    aligned: the model that the calibrated vectors belong to. The covered rows that stay are spread evenly.
    """
    covered: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        found = [standing(aligned, chunk, topic) for topic in _topics(vectors)]
        covered += [start + i for i, each in enumerate(zip(*found, strict=True)) if "covered" in each]
        if progress is not None:
            progress(start + len(chunk), len(rows))
    room = max(LEAST, len(rows) - len(covered))
    if len(covered) <= room:
        return []
    stay = {i * len(covered) // room for i in range(room)}
    return [row for i, row in enumerate(covered) if i not in stay]


def _topics(vectors: Sequence[SecurityVector]) -> list[SecurityVector]:
    return [vector for vector in vectors if vector.info.kind == "topic"]
