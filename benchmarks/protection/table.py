"""The results as a table: mean and worst over seeds, learned fractions against plain, oracle and aligned."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Line = Mapping[str, Any]
_CELL = ("behaviour", "skill", "tuning", "lr", "rows")


def markdown(lines: Sequence[Line]) -> str:
    """Return one row per behaviour, setting and method. A cell that was not run is missing, never guessed."""
    groups: dict[tuple[Any, ...], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        groups[tuple(line[key] for key in _CELL)][line["method"]].append(line)
    out = [
        "| behaviour | skill | tuning | lr | rows | method | seeds | unwanted mean (worst) | wanted mean (worst) "
        "| old skills mean (worst) | refusals | nats unwanted | nats wanted | learned unwanted | learned wanted | s |",
        "|" + "---|" * 16,
    ]
    for cell, methods in groups.items():
        for method, runs in methods.items():
            out.append(_row(cell, method, runs, methods))
    return "\n".join(out)


def _row(cell: tuple[Any, ...], method: str, runs: Sequence[Line], methods: Mapping[str, Sequence[Line]]) -> str:
    def both(key: str, worst: Any) -> str:
        values = [run[key] for run in runs]
        return f"{mean(values):.3f} ({worst(values):.3f})"

    shown = [*map(str, cell), method, str(len(runs)), both("unwanted_rate", max), both("wanted_skill", min)]
    shown += [both("old_skills", min), f"{mean(run['refusal_rate'] for run in runs):.3f}"]
    shown += [f"{mean(run[key] for run in runs):.2f}" for key in ("unwanted_nats", "wanted_nats")]
    shown += [_fraction("unwanted_nats", runs, methods, "oracle"), _fraction("wanted_nats", runs, methods, "aligned")]
    shown.append(f"{mean(run['seconds'] for run in runs):.0f}")
    return "| " + " | ".join(shown) + " |"


def _fraction(key: str, runs: Sequence[Line], methods: Mapping[str, Sequence[Line]], reference: str) -> str:
    """Return (NLL_ref - NLL_after) / (NLL_ref - NLL_plain), or nothing where plain or the reference was not run."""
    if not methods.get(reference) or not methods.get("plain"):
        return ""
    ref, plain, after = (mean(run[key] for run in part) for part in (methods[reference], methods["plain"], runs))
    return f"{(ref - after) / (ref - plain):.3f}" if ref != plain else ""
