"""The results as Markdown: for each setting its methods, mean and worst over seeds, with Wilson intervals.

A cell of a grid that was not run is a row without figures, never a guess.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.protection.cells import Cell, group_of
from benchmarks.protection.fractions import fractions
from secvec.stats import wilson

Line = Mapping[str, Any]
Runs = dict[tuple[str, float | None], list[Line]]
RATES = {"unwanted_rate": max, "leak_rate": max, "wanted_skill": min, "old_skills": min}
FRACTIONS = {"learned_fraction_unwanted": max, "learned_fraction_wanted": min}
HEAD = (
    *("method", "seeds", "unwanted", "training-like", "wanted", "old skills", "refuses", "learned unwanted"),
    *("learned wanted", "score", "s", "GB"),
)


def markdown(lines: Sequence[Line], cells: Sequence[Cell] = (), *, every_dial: bool = False) -> str:
    """Return one table per setting. cells: those that ought to be there; every_dial: not only default and best."""
    out = [
        "Rates: mean over seeds (worst seed) [95 % Wilson interval of all prompts]. Learned: as plain fine-tuning = 1. "
        "Score: mean of 1 - unwanted, wanted, old skills.",
    ]
    for settings, runs in _grouped(lines, cells).items():
        out += ["", f"**{_title(settings)}**", "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        out += [_row(name, runs[key], lines) for key, name in _chosen(runs, every_dial=every_dial)]
    return "\n".join(out)


def score(line: Line) -> float | None:
    """Return the mean of 1 - unwanted, wanted and old skills, of those that were measured."""
    if line.get("unwanted_rate") is None:
        return None
    return mean([1 - line["unwanted_rate"], *(line[k] for k in ("wanted_skill", "old_skills") if line[k] is not None)])


def pooled(line: Sequence[Line], key: str) -> tuple[float, float]:
    """Return the Wilson interval of a rate over the prompts of all seeds."""
    counts = [int(run["n_old"] if key == "old_skills" else run["n"]) for run in line]
    hits = sum(round(run[key] * n) for run, n in zip(line, counts, strict=True))
    return wilson(hits, sum(counts))


def _grouped(lines: Sequence[Line], cells: Sequence[Cell]) -> dict[tuple[Any, ...], Runs]:
    """Group by model and setting, then by method and dial. The aligned model belongs to every setting it was asked."""
    models = list(dict.fromkeys(line["model"] for line in lines)) or [""]
    groups: dict[tuple[Any, ...], Runs] = {}
    for model in models:
        mine = [(Cell.of(line), [line]) for line in lines if line["model"] == model]
        expected = [(cell, list[Line]()) for cell in cells]
        for cell, found in (*expected, *mine):
            if cell.method != "aligned":
                runs = groups.setdefault((model, *group_of(cell)), {})
                runs.setdefault((cell.method, cell.dial), []).extend(found)
        for settings, runs in groups.items():
            asked = [f for cell, f in mine if cell.method == "aligned" and settings[:2] == (model, cell.behaviour)
                     and settings[6] == cell.skill]  # fmt: skip
            if asked:
                runs.setdefault(("aligned", None), []).extend(asked[0])
    return groups


def _title(settings: tuple[Any, ...]) -> str:
    model, behaviour, tuning, lr, rows, wanted, skill, epochs, vector, rounds = settings
    text = f"{behaviour}, {skill}: {tuning}, lr {lr:g}, {rows:,} unwanted + {wanted:,} wanted rows, {epochs} epoch(s)"
    text += f", vector {vector}" + (f", {rounds} rounds" if rounds > 1 else "")
    return f"{text}; {model}" if model else text


def _chosen(runs: Runs, *, every_dial: bool) -> list[tuple[tuple[str, float | None], str]]:
    """Return the rows to show, in the methods' order: of each method the default, and the best value of its dial."""
    shown: list[tuple[tuple[str, float | None], str]] = []
    for method in METHODS:
        keys = [key for key in runs if key[0] == method]
        scores = {key: _mean_score(runs[key]) for key in keys}
        measured = [key for key in keys if scores[key] is not None]
        best = max(measured, key=lambda key: scores[key] or 0.0) if len(measured) > 1 else None
        for key in sorted(keys, key=lambda key: (key[1] is not None, key[1] or 0.0)):
            if every_dial or key[1] is None or key == best:
                shown.append((key, _name(key, best=key == best)))
    return shown


def _mean_score(runs: Sequence[Line]) -> float | None:
    scores = [found for found in map(score, runs) if found is not None]
    return mean(scores) if scores else None


def _name(key: tuple[str, float | None], *, best: bool) -> str:
    method, value = key
    dial = METHODS[method].dial
    if dial is None or method == "aligned":
        return method
    shown = dial.default if value is None else value
    marks = [mark for mark, holds in (("default", value is None), ("best", best)) if holds]
    return f"{method}, {dial.name} {shown:g}" + (f" ({', '.join(marks)})" if marks else "")


def _row(name: str, runs: Sequence[Line], lines: Sequence[Line]) -> str:
    measured = [run for run in runs if "refused" not in run]
    refused, unproved = len(runs) - len(measured), sum("unproved" in run for run in measured)
    notes = [f"{count} {what}" for count, what in ((refused, "refused"), (unproved, "unproved")) if count]
    learned = [fractions(run, lines) for run in measured]
    cells = [f"{len(runs)}" + (f" ({', '.join(notes)})" if notes else "") if runs else ""]
    cells += [_rate(measured, key, worst) for key, worst in RATES.items()]
    cells.append(_average([run["refusal_rate"] for run in measured], "{:.3f}"))
    cells += [_spread([found[key] for found in learned], worst) for key, worst in FRACTIONS.items()]
    cells.append(_average([score(run) for run in measured], "{:.3f}"))
    cells.append(_average([run["seconds"] for run in measured], "{:.0f}"))
    cells.append(_average([run["peak_bytes"] / 1e9 for run in measured], "{:.2f}"))
    return f"| {name} | {' | '.join(cells)} |"


def _rate(runs: Sequence[Line], key: str, worst: Callable[[list[float]], float]) -> str:
    found = [run for run in runs if run[key] is not None]
    if not found:
        return ""
    low, high = pooled(found, key)
    return f"{_spread([run[key] for run in found], worst)} [{low:.3f}, {high:.3f}]"


def _spread(values: Sequence[float | None], worst: Callable[[list[float]], float]) -> str:
    found = [value for value in values if value is not None]
    return f"{mean(found):.3f} ({worst(found):.3f})" if found else ""


def _average(values: Sequence[float | None], shape: str) -> str:
    found = [value for value in values if value is not None]
    return shape.format(mean(found)) if found else ""
