"""Run cells in processes of their own, a few at a time, and say beforehand how long that takes."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

from benchmarks.methods import REFERENCES
from benchmarks.protection.cells import Cell
from benchmarks.protection.fractions import fractions
from benchmarks.protection.lines import Line, append, read_lines
from benchmarks.protection.one import Bench, line_of

# Where nothing was measured yet, on one core of a small machine: start and measurements, a fit, a step.
_START_S, _FIT_S, _STEP_S = 40, 60, 0.5
_WITHOUT_FIT = (*REFERENCES, "inoculation_prompt", "safety_mix", "constrained_sft")
_POLL_S = 0.2


def estimated_s(cells: Sequence[Cell], lines: Sequence[Line], jobs: int) -> float:
    """Return the seconds that cells will take: as long as runs of the same method and steps did, else a rough guess."""
    return sum(_cell_s(cell, lines) for cell in cells) / jobs


def _cell_s(cell: Cell, lines: Sequence[Line]) -> float:
    done = [line for line in lines if line["method"] == cell.method and "seconds" in line]
    alike = [line["seconds"] for line in done if Cell.of(line).steps == cell.steps]
    if alike:
        return _START_S / 2 + median(alike)
    fit = 0 if cell.method in _WITHOUT_FIT else _FIT_S * cell.rounds
    steps = 0 if cell.method == "aligned" else cell.steps * (0.5 if cell.method == "oracle" else 1)
    return _START_S + fit + _STEP_S * steps


def run_all(cells: Sequence[Cell], bench: Bench, results: Path, jobs: int) -> list[Cell]:
    """Run each cell in its own process, which appends its line; return the cells that failed.

    The processes are forked off one that has imported everything and done nothing else. A killed command leaves whole
    lines only; started again it runs what is missing.
    """
    waiting, running, failed = list(cells), dict[Cell, BaseProcess](), list[Cell]()
    with tempfile.TemporaryDirectory(prefix="secvec-protection-") as scratch, _server(scratch, jobs):
        context = multiprocessing.get_context("forkserver")
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    running[cell] = context.Process(target=run_one, args=(cell, bench, results))
                    running[cell].start()
                time.sleep(_POLL_S)
                for cell in [cell for cell, process in running.items() if not process.is_alive()]:
                    if (code := running.pop(cell).exitcode) != 0:
                        failed.append(cell)
                        print(f"failed ({code}): {cell}", file=sys.stderr)
        finally:
            for process in running.values():
                process.terminate()
                process.join()
    return failed


def run_one(cell: Cell, bench: Bench, results: Path) -> None:
    """Run one cell in this process, append its line and print it.

    Learned fractions stand in the line where the references of the same cell are there already; tables find them later.
    """
    line = line_of(cell, bench)
    line |= fractions(line, read_lines([results]))
    append(results, line)
    print(short(line), flush=True)


def short(line: Line) -> str:
    """Return what a person watching wants to read of a line."""
    shown = ("behaviour", "method", "dial", "tuning", "lr", "rows", "seed", "seconds", "refused", "unwanted_rate")
    shown += ("leak_rate", "wanted_skill", "old_skills", "learned_fraction_unwanted", "learned_fraction_wanted")
    return " ".join(f"{key}={_rounded(line[key])}" for key in shown if line.get(key) is not None)


@contextmanager
def _server(scratch: str, jobs: int) -> Generator[None]:
    """Let the forking process start with its share of the cores, and with a scratch folder that is removed."""
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
    before = dict(os.environ)
    os.environ.update({"OMP_NUM_THREADS": str(threads), "TMPDIR": scratch, "TQDM_DISABLE": "1"})
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.protection.one"])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rounded(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value
