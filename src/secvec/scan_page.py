"""The page of a scan: one file that needs no network, with the rows that matter first; no torch."""

import heapq
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from secvec.datafiles import DataFiles
from secvec.samples import Sample, stream_samples
from secvec.scan_rows import ScannedRow

MAX_BYTES = 1_900_000
MAX_TEXT_CHARACTERS = 1_000
# At most so many rows of a kind: explained, in rising order of drop; others, likewise; not scored, the first ones.
_EXPLAINED, _OTHERS, _UNSCORED = 4_000, 1_500, 500
_FINEST_NATS = 0.01
_WIDTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000)
_MOST_BARS = 48
_WIDEST_NATS = 100.0
_DATA = "__SCAN__"
_Heap = list[tuple[float, int, ScannedRow]]
_Place = tuple[str, int]
"""A file and a line in it."""


def scan_page(rows: Iterable[ScannedRow], summary: Mapping[str, Any], data: DataFiles | None) -> bytes:
    """Return the page as UTF-8, under 2 MB however many rows there are: the rest is counted, not listed.

    data: the scanned files, to put the texts of the listed rows into the page; None: the page holds no text.
    """
    page, bins = _Listed(), Bins()
    for row in rows:
        page.add(row)
        bins.add(row)
    listed = page.rows()
    texts = {} if data is None else _texts(data, {(row.file, row.line) for row in listed})
    template = resources.files("secvec").joinpath("pages/scan.html").read_text(encoding="utf-8")
    while True:
        document = {"summary": summary, "bars": bins.bars(), "rows": _table(listed, list(summary["vectors"]), texts)}
        # As the page holds it: nothing in it may end the script element.
        text = json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")
        made = template.replace(_DATA, text).encode()
        if len(made) <= MAX_BYTES or not listed:
            return made
        listed = listed[: int(len(listed) * min(0.9, MAX_BYTES / len(made)))]


class _Listed:
    """The rows for the page, a bounded number of each kind."""

    def __init__(self) -> None:
        self.explained: _Heap = []
        self.others: _Heap = []
        self.unscored: _Heap = []
        self.seen = 0

    def add(self, row: ScannedRow) -> None:
        self.seen += 1
        if row.drop is None:
            _keep(self.unscored, (0.0, -self.seen, row), _UNSCORED)
        elif row.explained:
            _keep(self.explained, (row.drop, -self.seen, row), _EXPLAINED)
        else:
            _keep(self.others, (row.drop, -self.seen, row), _OTHERS)

    def rows(self) -> list[ScannedRow]:
        """Explained rows first, then those that could not be scored, then the others; the largest drop first."""
        heaps = (self.explained, self.unscored, self.others)
        return [row for heap in heaps for _, _, row in sorted(heap, reverse=True)]


def _keep(heap: _Heap, entry: tuple[float, int, ScannedRow], most: int) -> None:
    if len(heap) < most:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


class Bins:
    """Counts of rows by drop, fine at first; made coarser when it is known how far they reach."""

    def __init__(self) -> None:
        self.counts: tuple[Counter[int], Counter[int]] = Counter(), Counter()

    def add(self, row: ScannedRow) -> None:
        if row.drop is not None:
            drop = max(-_WIDEST_NATS, min(row.drop, _WIDEST_NATS))
            self.counts[row.explained][int(drop // _FINEST_NATS)] += 1

    def bars(self) -> dict[str, Any]:
        """Return the width of a bar and, for each, where it starts (nats/token) and how many rows it counts."""
        seen = {*self.counts[0], *self.counts[1]} or {0}
        low, high = min(seen), max(seen)
        width = next((w for w in _WIDTHS if (high // w) - (low // w) < _MOST_BARS), _WIDTHS[-1])
        first = low // width
        bars = [[0, 0] for _ in range(high // width - first + 1)]
        for kind, counts in enumerate(self.counts):
            for place, count in counts.items():
                bars[place // width - first][kind] += count
        return {"start": round(first * width * _FINEST_NATS, 2), "width": width * _FINEST_NATS, "counts": bars}


def _table(rows: Sequence[ScannedRow], names: Sequence[str], texts: Mapping[_Place, str]) -> list[list[Any]]:
    """Return rows as the page reads them: place, tokens, unarmed, armed, drop, the vector's number, flags, text."""
    short = _short_names({row.file for row in rows})
    return [
        [
            f"{short[row.file]}:{row.line}",
            row.tokens,
            _short(row.loss_unarmed),
            [_short(row.loss_armed.get(name)) for name in names],
            _short(row.drop),
            -1 if row.vector is None else names.index(row.vector),
            [*row.flags, *([row.reason] if row.reason else [])],
            texts.get((row.file, row.line)),
        ]
        for row in rows
    ]


def _short_names(files: set[str]) -> dict[str, str]:
    """Return files by their own names or, where there are several folders, with those that they do not share."""
    shared = os.path.commonpath([Path(file).parent for file in files]) if files else ""
    return {file: os.path.relpath(file, shared or ".") for file in files}


def _short(nats: float | None) -> float | None:
    return None if nats is None else round(nats, 3)


def _texts(data: DataFiles, places: set[_Place]) -> dict[_Place, str]:
    found: dict[_Place, str] = {}
    for row in stream_samples(data):
        if (row.file, row.line) in places and isinstance(row.sample, Sample):
            text = "\n\n".join(f"{message.role}: {message.content}" for message in row.sample.messages)
            more = len(text) - MAX_TEXT_CHARACTERS
            found[row.file, row.line] = text[:MAX_TEXT_CHARACTERS] + (
                f" ... ({more:,} more characters)" if more > 0 else ""
            )
    return found
