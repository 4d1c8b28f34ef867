"""Plots of the results, from the lines alone: unwanted, wanted and old skills along what a grid varies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.protection.cells import Cell
from benchmarks.protection.table import pooled
from secvec.errors import MissingExtraError

Line = Mapping[str, Any]
PANELS = ("unwanted_rate", "leak_rate", "wanted_skill", "old_skills")
Point = tuple[Any, float, float, float]
"""(x, mean, low, high)"""


def plot(lines: Sequence[Line], axis: str, out: Path, name: str) -> list[Path]:
    """Write one figure for each behaviour and way of fine-tuning to the folder `out`; return their paths.

    axis: the field of a line along which methods are drawn; "method": a point each, where nothing else varies.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report") from error
    mpl.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    measured = [line for line in lines if "refused" not in line and line["method"] != "aligned"]
    by_behaviour = axis != "behaviour"
    keys = dict.fromkeys((line["behaviour"] if by_behaviour else "", line["tuning"]) for line in measured)
    paths: list[Path] = []
    for behaviour, tuning in keys:
        chosen = [x for x in measured if x["tuning"] == tuning and (not by_behaviour or x["behaviour"] == behaviour)]
        path = out / "-".join(part for part in (name, behaviour.replace("+", "-"), tuning) if part)
        paths.append(_figure(chosen, axis, f"{behaviour or name}, {tuning}", path.with_suffix(".png")))
    return paths


def curves(lines: Sequence[Line], axis: str, key: str) -> dict[str, list[Point]]:
    """Return each method's points of a rate: mean over seeds with the Wilson interval of all prompts."""
    found: dict[str, list[Point]] = {}
    for method in METHODS:
        mine = [line for line in lines if line["method"] == method and line["dial"] is None and line[key] is not None]
        for x in dict.fromkeys(sorted(line[axis] for line in mine)):
            runs = [line for line in mine if line[axis] == x]
            found.setdefault(method, []).append((x, mean(run[key] for run in runs), *pooled(runs, key)))
    return found


def rounds(lines: Sequence[Line], key: str) -> dict[str, list[Point]]:
    """Return each method's rate after each round of fine-tuning, with the lowest and highest of the seeds."""
    found: dict[str, list[Point]] = {}
    for method in METHODS:
        runs = [line["rounds_measured"] for line in lines if line["method"] == method and "rounds_measured" in line]
        for number, values in enumerate(zip(*([each[key] for each in run] for run in runs), strict=False), start=1):
            found.setdefault(method, []).append((number, mean(values), min(values), max(values)))
    return found


def _figure(lines: Sequence[Line], axis: str, title: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    keys = [key for key in PANELS if axis != "rounds" or key != "leak_rate"]
    figure = Figure(figsize=(4 * len(keys), 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        found = rounds(lines, key) if axis == "rounds" else curves(lines, axis, key)
        for method, points in found.items():
            x, y, low, high = zip(*points, strict=True)
            bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            bars = [[max(value, 0.0) for value in side] for side in bars]
            axes.errorbar(x, y, yerr=bars, label=method, marker="o", capsize=2)
        axes.set(title=key.replace("_", " "), xlabel=axis, ylim=(-0.03, 1.03))
        axes.tick_params(axis="x", rotation=45 if axis in ("method", "behaviour") else 0)
        if found and all(isinstance(point[0], float) for points in found.values() for point in points):
            axes.set_xscale("log")
    axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def cells_of(lines: Sequence[Line], cells: Sequence[Cell]) -> list[Line]:
    """Return the lines of some cells."""
    wanted = set(cells)
    return [line for line in lines if Cell.of(line) in wanted]
