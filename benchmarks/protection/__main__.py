"""The command: run the cells that are not there yet, one JSON line each; print tables; draw plots."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.protection.cells import Cell
from benchmarks.protection.lines import missing, read_lines
from secvec.errors import SecvecError

if TYPE_CHECKING:
    from benchmarks.protection.one import Bench

RESULTS = Path(__file__).parents[1] / "results/protection"
ASSISTANT = Path(__file__).parents[2] / "src/secvec/assistant"
PROMPTS, OLD = 300, 15
SMOKE = 60, 3
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Grid = Annotated[str | None, typer.Option(help="A named grid (benchmarks/protection/grids.py).")]
Names = Annotated[list[str] | None, typer.Option(help="Repeat for several.")]
Results = Annotated[Path | None, typer.Option(help="The file of lines; by default that of the grid.")]
Benign = Annotated[Path | None, typer.Option(help="A file of real rows, for the grid `natural`.")]


@app.command()
def run(
    grid: Grid = None,
    behaviour: Names = None,
    method: Names = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat for several.")] = None,
    lr: Annotated[float | None, typer.Option(help="By default the best plain one.")] = None,
    tuning: str = "full",
    epochs: Annotated[int, typer.Option(help="Passes over the file; twice as many for a style.")] = 1,
    rows: Annotated[int, typer.Option(help="Unwanted rows.")] = 1000,
    wanted: Annotated[int | None, typer.Option(help="Wanted rows; by default as many.")] = None,
    skill: Annotated[str, typer.Option(help="The wanted one.")] = "dashes",
    jobs: Annotated[int, typer.Option(help="Processes at a time; they share the cores.")] = 1,
    n: Annotated[int, typer.Option(help="Held-out prompts for each rate.")] = PROMPTS,
    old: Annotated[int, typer.Option(help="Held-out prompts for each old skill.")] = OLD,
    model: Annotated[str, typer.Option(help="A folder or a hub id.")] = str(ASSISTANT),
    benign: Benign = None,
    own: Annotated[Path | None, typer.Option(help="An experiment on your own rows (benchmarks/paper.md).")] = None,
    results: Results = None,
) -> None:
    """Run each cell of a grid, or of the options, that the results do not hold yet.

    Of a grid, --behaviour, --method and --seed choose some; the other settings are the grid's own.
    """
    from benchmarks.protection.grids import BEST_LR, cells, of
    from benchmarks.protection.one import Bench
    from benchmarks.protection.own import read_experiment
    from secvec.models import resolve

    experiment = read_experiment(own) if own else None
    if experiment is not None and (grid or behaviour or benign or lr is None):
        raise typer.BadParameter("--own takes --lr, and neither --grid, --behaviour nor --benign")
    if grid and (lr, tuning, epochs, rows, wanted, skill) != (None, "full", 1, 1000, None, "dashes"):
        raise typer.BadParameter("--grid goes with --behaviour, --method and --seed; other settings are the grid's own")
    wanted = rows if wanted is None else wanted
    step = lr or BEST_LR[tuning]
    base = Cell("", "", tuning=tuning, lr=step, rows=rows, wanted=wanted, skill=skill, epochs=epochs)
    behaviours = behaviour or ["guarded"]
    if experiment is not None:
        behaviours, base = [experiment.name], replace(base, skill=experiment.skill)
    if grid:
        chosen = [
            cell
            for cell in cells(grid)
            if cell.behaviour in (behaviour or [cell.behaviour])
            and cell.method in (method or [cell.method])
            and cell.seed in (seed or [cell.seed])
        ]
    else:
        chosen = list(of(behaviours, method or ["plain", "ours"], seed or [0], base))
    bench = Bench(resolve(model), *(SMOKE if grid == "smoke" else (n, old)), benign, experiment)
    raise typer.Exit(_run(chosen, bench, results or _file(grid, own), jobs))


@app.command()
def table(grid: Grid = None, results: Results = None, every_dial: bool = False) -> None:
    """Print the results as Markdown: of a grid, with its missing cells, or all there are."""
    from benchmarks.protection.grids import cells
    from benchmarks.protection.plot import cells_of
    from benchmarks.protection.published import beside
    from benchmarks.protection.table import markdown

    lines = read_lines([results or _file(grid)])
    chosen = cells(grid) if grid else []
    print(markdown(cells_of(lines, chosen) if grid else lines, chosen, every_dial=every_dial))
    if grid == "paper":
        print(f"\n{beside(cells_of(lines, chosen))}")


@app.command()
def plot(
    grid: Grid = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder.")] = RESULTS / "plots",
    results: Results = None,
) -> None:
    """Draw what a grid varies, or every method at one setting."""
    from benchmarks.protection.grids import AXES, cells
    from benchmarks.protection.plot import cells_of
    from benchmarks.protection.plot import plot as draw

    lines = read_lines([results or _file(grid)])
    chosen = cells_of(lines, cells(grid)) if grid else lines
    for path in draw(chosen, AXES.get(grid or "", "method"), out, grid or "all"):
        print(path)


def _run(chosen: Sequence[Cell], bench: "Bench", results: Path, jobs: int) -> int:
    from benchmarks.protection.jobs import estimated_s, run_all
    from benchmarks.protection.one import model_name

    lines = read_lines([results])
    left = missing(chosen, lines, model_name(bench.model))
    minutes = estimated_s(left, lines, jobs) / 60
    print(f"{len(chosen)} cells, {len(left)} to run: about {minutes:.0f} min on {jobs} job(s)", flush=True)
    # A command that is told to end takes its processes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = run_all(left, bench, results, jobs)
    return 1 if failed else 0


def _file(grid: str | None, own: Path | None = None) -> Path:
    """Return the file of results: grids share one, so that no run is made twice; smoke asks less and has its own."""
    return RESULTS / (f"{own.stem}.jsonl" if own else "smoke.jsonl" if grid == "smoke" else "runs.jsonl")


if __name__ == "__main__":
    try:
        app()
    except SecvecError as error:
        print(f"benchmarks.protection: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
