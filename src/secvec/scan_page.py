"""The page of a scan: one file that needs no network, with the rows that matter first; no torch."""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

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


def scan_page(rows: Iterable[ScannedRow], summary: Mapping[str, Any], data: Path | None) -> bytes:
    """Return the page as UTF-8, under 2 MB however many rows there are: the rest is counted, not listed.

    data: the scanned file, to put the texts of the listed rows into the page; None: the page holds no text.
    """
    page, bins = _Listed(), _Bins()
    for row in rows:
        page.add(row)
        bins.add(row)
    listed = page.rows()
    texts = {} if data is None else _texts(data, {row.line for row in listed})
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

    def add(self, row: ScannedRow) -> None:
        if row.drop is None:
            _keep(self.unscored, -row.line, row, _UNSCORED)
        elif row.explained:
            _keep(self.explained, row.drop, row, _EXPLAINED)
        else:
            _keep(self.others, row.drop, row, _OTHERS)

    def rows(self) -> list[ScannedRow]:
        """Explained rows first, then those that could not be scored, then the others; the largest drop first."""
        heaps = (self.explained, self.unscored, self.others)
        return [row for heap in heaps for _, _, row in sorted(heap, reverse=True)]


def _keep(heap: _Heap, worth: float, row: ScannedRow, most: int) -> None:
    entry = (worth, -row.line, row)
    if len(heap) < most:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


class _Bins:
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


def _table(rows: Sequence[ScannedRow], names: Sequence[str], texts: Mapping[int, str]) -> list[list[Any]]:
    """Return rows as the page reads them: line, tokens, unarmed, armed, drop, the vector's number, flags, text."""
    return [
        [
            row.line,
            row.tokens,
            _short(row.loss_unarmed),
            [_short(row.loss_armed.get(name)) for name in names],
            _short(row.drop),
            -1 if row.vector is None else names.index(row.vector),
            [*row.flags, *([row.reason] if row.reason else [])],
            texts.get(row.line),
        ]
        for row in rows
    ]


def _short(nats: float | None) -> float | None:
    return None if nats is None else round(nats, 3)


def _texts(data: Path, lines: set[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for row in stream_samples(data):
        if row.line in lines and isinstance(row.sample, Sample):
            text = "\n\n".join(f"{message.role}: {message.content}" for message in row.sample.messages)
            more = len(text) - MAX_TEXT_CHARACTERS
            found[row.line] = text[:MAX_TEXT_CHARACTERS] + (f" ... ({more:,} more characters)" if more > 0 else "")
    return found
