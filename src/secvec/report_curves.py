"""The training curves of a report: the unwanted rows' loss armed and disarmed, and the trainer's own; no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from secvec.charts import Point, curves
from secvec.drift_record import drift_line
from secvec.report_files import Metric
from secvec.report_inputs import Inputs, Run
from secvec.report_page import Chart, Section, Table

_DRAWN_POINTS, _LISTED_POINTS = 300, 12
_ACTED = {"stop": "stopped", "slow": "slowed"}
_UNWANTED = "the unwanted rows' loss, armed and disarmed"


def training_curves(inputs: Inputs) -> Section:
    """Return the section: a chart for each vector of each defended run, then one of all runs' training losses."""
    measured = [run for run in inputs.runs if _measured(run)]
    words = [_WORDS] if measured else []
    words += [f"{run.folder}: {line}." for run in measured if (line := _in_words(run))]
    charts = [_drift_chart(run, number) for run in measured for number in _measured(run)]
    if any(map(_points, inputs.runs)):
        words.append(_TRAINING_WORDS)
        charts.append(_training_chart(inputs))
    return Section("Training curves, armed and disarmed", words, charts=charts, missing=_missing(inputs))


_WORDS = (
    "The unwanted rows' loss while a defended model was trained, on the tokens on which the vector acts: armed, with "
    "the vectors in effect, and disarmed, without them. Disarmed at the aligned model's loss, nothing of them is "
    "learned; disarmed at the armed loss, all."
)
_TRAINING_WORDS = (
    "The training loss is that of all training rows, wanted and unwanted, as the trainer logged it, in nats per "
    "learned token. A run that is trained armed starts lower, because the vector explains the unwanted rows."
)


def _missing(inputs: Inputs) -> list[str]:
    defended = [run for run in inputs.runs if run.defended]
    asks = [
        f"not measured: {_UNWANTED}, in {run.folder}: train with `--unwanted FILE`"
        for run in defended
        if not _measured(run)
    ]
    if not defended:
        asks.append(
            f"not measured: {_UNWANTED}: run `secvec train ... --vector VECTOR --unwanted FILE`, give its folder"
        )
    if not any(_points(run) for run in inputs.runs if not run.defended):
        asks.append(
            "not measured: the training loss of a plain run: run `secvec train` without `--vector` on the same data, "
            "give its folder"
        )
    return asks


def _in_words(run: Run) -> str:
    return drift_line(asdict(cast(Any, run.proof.drift))) if run.proof and run.proof.drift else ""


def _measured(run: Run) -> list[int]:
    """Return the places of the vectors whose unwanted rows were measured while the run was trained."""
    return sorted({each.vector for each in run.metrics if each.vector is not None})


def _drift_chart(run: Run, vector: int) -> Chart:
    lines = [each for each in run.metrics if each.vector == vector]
    losses = {
        "armed, with the vectors in effect": [(each.step, each.unwanted_armed_nats) for each in lines],
        "disarmed, without them": [(each.step, each.unwanted_disarmed_nats) for each in lines],
        "aligned, before training": [(each.step, each.unwanted_aligned_nats) for each in lines],
    }
    drawn = {name: _known(points) for name, points in losses.items() if _known(points)}
    marks = {_ACTED[each.drift]: each.step for each in run.metrics if each.drift}
    title = f"{run.folder}, vector {vector + 1}: loss of its unwanted rows"
    svg = curves(drawn, title=title, x="step", y="nats/token", marks=marks)
    head = ["step", "armed", "disarmed", "of the way from aligned to armed"]
    rows = [[_step(each, marks), *_cells(each)] for each in lines]
    return Chart(svg, _legend(drawn), Table(title, str(run.folder / "metrics.jsonl"), head, rows))


def _step(line: Metric, marks: Mapping[str, int]) -> str:
    return ", ".join([f"{line.step:,}", *(name for name, step in marks.items() if step == line.step)])


def _cells(line: Metric) -> list[str]:
    return [
        f"{line.unwanted_armed_nats:.4f}",
        f"{line.unwanted_disarmed_nats:.4f}",
        f"{line.unwanted_share:.1%}",
    ]


def _training_chart(inputs: Inputs) -> Chart:
    lines = {_name(run): _thinned(_points(run), _DRAWN_POINTS) for run in inputs.runs if _points(run)}
    svg = curves(lines, title="Training loss by step", x="step", y="nats/token")
    sources = ", ".join(str(run.folder / "metrics.jsonl") for run in inputs.runs if _points(run))
    rows = [
        [name, f"{step:,}", f"{loss:.4f}"]
        for name, points in lines.items()
        for step, loss in _thinned(points, _LISTED_POINTS)
    ]
    return Chart(svg, _legend(lines), Table("Training loss", sources, ["run", "step", "nats/token"], rows))


def _name(run: Run) -> str:
    return f"{run.folder}, {'trained armed' if run.defended else 'trained plainly'}"


def _legend(lines: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, f"line line-{i % 4}") for i, name in enumerate(lines)]


def _points(run: Run) -> list[Point]:
    return _known((each.step, each.loss) for each in run.metrics)


def _known(points: Iterable[tuple[int, float | None]]) -> list[Point]:
    return [(step, loss) for step, loss in points if loss is not None]


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most so many points, the first and the last among them."""
    last = len(points) - 1
    return [points[i] for i in sorted({round(i * last / (most - 1)) for i in range(most)})]
