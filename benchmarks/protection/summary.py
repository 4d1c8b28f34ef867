"""The README's tables of protection, from the lines of results: ours beside plain and oracle, and beside the rivals.

best_lr: for each tuning the step size at which plain fine-tuning of the lines' model is best; other lines are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean

from benchmarks.methods import CONTROLS, METHODS
from benchmarks.protection.cases import ALL
from benchmarks.protection.cells import Cell
from benchmarks.protection.grids import BEST_LR, of
from benchmarks.protection.lines import Line
from benchmarks.protection.table import score
from benchmarks.testbed.mixes import is_style

_ORDER = ("plain", "oracle", "ours")
_HEAD = (
    "| rows | seeds | unwanted: plain, ours | training-like: ours | wanted: plain, oracle, ours "
    "| old skills: plain, oracle, ours | learned of the unwanted (plain = 1) |",
    "|" + "---|" * 7,
)


def summary(lines: Sequence[Line], best_lr: Mapping[str, float] = BEST_LR) -> str:
    """Return a row for each behaviour, skill and tuning at the best plain step size, over the seeds that ours has."""
    out = list(_HEAD)
    mine = [line for line in lines if _is_main(line, best_lr)]
    for name in dict.fromkeys(map(_name, mine)):
        group = [x for x in mine if _name(x) == name]
        if seeds := sorted(x["seed"] for x in group if x["method"] == "ours"):
            out.append(_row(name, [x for x in group if x["seed"] in seeds], len(seeds)))
    return "\n".join(out)


def wear(lines: Sequence[Line], best_lr: Mapping[str, float] = BEST_LR) -> str:
    """Return a row for each training that is harder on the vector than the usual one, over the seeds that ours has."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if (harder := _harder(Cell.of(line), best_lr)) and "refused" not in line:
            groups.setdefault(f"{_name(line)}: {harder}", []).append(line)
    out = list(_HEAD)
    for name, group in sorted(groups.items()):
        if seeds := {x["seed"] for x in group if x["method"] == "ours"}:
            out.append(_row(name, [x for x in group if x["seed"] in seeds], len(seeds)))
    return "\n".join(out)


def _name(line: Line) -> str:
    return f"{line['behaviour']}, {line['skill']}, {line['tuning']}"


def rivals(lines: Sequence[Line], behaviours: Sequence[str], best_lr: Mapping[str, float] = BEST_LR) -> str:
    """Return a row for each method, at the default of its dial, over the seeds that all but the controls have.

    Full fine-tuning on the first wanted skill.
    """
    mine = [x for x in lines if _is_main(x, best_lr) and x["tuning"] == "full" and x["skill"] == "dashes"]
    groups = {b: _by_method([x for x in mine if x["behaviour"] == b]) for b in behaviours}
    head = ["method", *(f"{b}{_seeds(groups[b])}: unwanted, training-like, wanted, old, score" for b in behaviours)]
    out = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method in METHODS:
        shown = [_rival(groups[b].get(method, [])) for b in behaviours]
        if any(shown):
            name = f"{method} (control)" if method in CONTROLS else method
            out.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(out)


def _is_main(line: Line, best_lr: Mapping[str, float]) -> bool:
    """Tell whether a line is a run at the best plain step size with the default settings."""
    cell = Cell.of(line)
    return cell == _usual(cell, best_lr) and "refused" not in line and cell.method != "aligned"


def _usual(cell: Cell, best_lr: Mapping[str, float]) -> Cell:
    base = Cell("", "", tuning=cell.tuning, lr=best_lr.get(cell.tuning, 0.0), skill=cell.skill)
    [usual] = of((cell.behaviour,), (cell.method,), (cell.seed,), base)
    return usual


def _harder(cell: Cell, best_lr: Mapping[str, float]) -> str:
    """Say in what a training is harder than the usual one; nothing where it is not, or differs otherwise too."""
    usual = _usual(cell, best_lr)
    if replace(cell, lr=usual.lr, rows=usual.rows, epochs=usual.epochs, rounds=usual.rounds) != usual:
        return ""
    found = {
        f"{cell.lr / usual.lr:g} x the step size": cell.lr > usual.lr,
        f"{cell.epochs / usual.epochs:g} x the passes": cell.epochs > usual.epochs,
        f"{cell.rows:,} unwanted rows": cell.rows > usual.rows,
        f"{cell.rounds} rounds": cell.rounds > usual.rounds,
    }
    return ", ".join(name for name, is_so in found.items() if is_so)


def _row(what: str, group: Sequence[Line], seeds: int) -> str:
    by_method = {method: [x for x in group if x["method"] == method] for method in _ORDER}
    unproved = sum("unproved" in x for x in by_method["ours"])
    shown = [
        what + (f" ({unproved} not published)" if unproved else ""),
        str(seeds),
        ", ".join(_mean(by_method[m], "unwanted_rate", max) for m in ("plain", "ours")),
        _mean(by_method["ours"], "leak_rate", max),
        ", ".join(_mean(by_method[m], "wanted_skill", min) for m in _ORDER),
        ", ".join(_mean(by_method[m], "old_skills", min) for m in _ORDER),
        _mean([x for x in by_method["ours"] if not _has_style(x)], "learned_fraction_unwanted", max),
    ]
    return f"| {' | '.join(shown)} |"


def _has_style(line: Line) -> bool:
    """Tell whether a line has a style, the loss of whose held-out rows plain fine-tuning hardly moves."""
    return any(is_style(ALL[name]) for name in Cell.of(line).behaviours if name in ALL)


def _mean(group: Sequence[Line], key: str, worst: Callable[[list[float]], float]) -> str:
    values: list[float] = [x[key] for x in group if x.get(key) is not None]
    if not values:
        return "-"
    return f"{mean(values):.3f}" + (f" ({worst(values):.3f})" if len(values) > 1 else "")


def _by_method(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Group by method, with the seeds that every method but the controls has."""
    methods = list(dict.fromkeys(x["method"] for x in lines))
    seeds = [{x["seed"] for x in lines if x["method"] == method} for method in methods if method not in CONTROLS]
    common = set[int].intersection(*seeds) if seeds else set[int]()
    return {m: [x for x in lines if x["method"] == m and x["seed"] in common] for m in methods}


def _seeds(groups: Mapping[str, Sequence[Line]]) -> str:
    found = sorted({x["seed"] for group in groups.values() for x in group})
    return f" (seed{'s' * (len(found) > 1)} {', '.join(map(str, found))})" if found else ""


def _rival(group: Sequence[Line]) -> str:
    if not group:
        return ""
    keys = ("unwanted_rate", "leak_rate", "wanted_skill", "old_skills")
    figures = [f"{mean(x[key] for x in group):.3f}" for key in keys]
    scores = [found for x in group if (found := score(x)) is not None]
    return f"{', '.join(figures)}, {mean(scores):.3f}"
