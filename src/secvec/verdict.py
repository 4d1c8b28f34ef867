"""Say of each scored row which vector explains it: a line of scan.jsonl from the evidence and the thresholds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from secvec.evidence import Evidence
from secvec.scan_rows import ScannedRow

_DECIMALS = 6


def judged(
    rows: Sequence[ScannedRow], names: Sequence[str], cuts: Sequence[float], found: Sequence[Evidence]
) -> Iterator[ScannedRow]:
    """Yield the rows with their losses and verdict. names, cuts (nats/token) and found: one of each a vector."""
    unarmed = found[0].unarmed_nats.tolist()
    armed = zip(*(evidence.armed_nats.tolist() for evidence in found), strict=True)
    strengths = zip(*(evidence.strength_nats.tolist() for evidence in found), strict=True)
    for row, before, after, strength in zip(rows, unarmed, armed, strengths, strict=True):
        if all(map(math.isfinite, (before, *after))):
            yield _with_verdict(
                row, names, before, after, [s if s > c else None for s, c in zip(strength, cuts, strict=True)]
            )
        else:
            yield replace(row, flags=(*row.flags, "unusable"), reason="its loss is not a finite number")


def _with_verdict(
    row: ScannedRow, names: Sequence[str], unarmed: float, armed: Sequence[float], passing: Sequence[float | None]
) -> ScannedRow:
    """passing: the strength of each vector that explains the row, None for the others."""
    explaining = [(strength, i) for i, strength in enumerate(passing) if strength is not None]
    best = max(explaining)[1] if explaining else min(range(len(armed)), key=lambda i: armed[i])
    return replace(
        row,
        loss_unarmed=round(unarmed, _DECIMALS),
        loss_armed={name: round(nats, _DECIMALS) for name, nats in zip(names, armed, strict=True)},
        drop=round(unarmed - armed[best], _DECIMALS),
        explained=bool(explaining),
        vector=names[best] if explaining else None,
    )
