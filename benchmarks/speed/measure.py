"""Run each task several times, in turns, and turn seconds and peaks into rows."""

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Row = dict[str, Any]
Taken = tuple[float, float]
"""(seconds, peak resident MB)"""
_RESAMPLES = 4000


@dataclass(frozen=True)
class Settings:
    """What to measure: the models' size, repeats of whole tasks, timed steps of training, a folder for the files."""

    size: str
    repeats: int
    steps: int
    scratch: Path


@dataclass
class Samples:
    """What the repeats of one task took: seconds and peak resident MB."""

    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def add(self, name: str, taken: Taken) -> None:
        self.seconds.append(taken[0])
        self.peak_mb.append(taken[1])
        print(f"  {name:28s} {taken[0]:7.2f} s {taken[1]:7.0f} MB", file=sys.stderr)


def run_in_turns(tasks: Mapping[str, Sequence[str]], out: Path, repeats: int) -> dict[str, Samples]:
    """Run all tasks `repeats` times in turns, so that a slow minute of the machine hits all alike.

    Each command ends with the folder it writes, `out`, which is removed afterwards. Dirty pages of the task before are
    written out first, unmeasured.
    """
    samples = {name: Samples() for name in tasks}
    for _ in range(repeats):
        for name, command in tasks.items():
            os.sync()
            samples[name].add(name, _run(command))
            shutil.rmtree(out)
    return samples


def _run(command: Sequence[str]) -> Taken:
    """Return the seconds and peak MB that the task printed, or the seconds of the whole process and no peak."""
    start_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole_s = time.perf_counter() - start_s
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    printed = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured ")]
    return (float(printed[0][0]), float(printed[0][1])) if printed else (whole_s, math.nan)


def call_in_turns(jobs: Mapping[str, Callable[[], Taken]], preload: str, repeats: int) -> dict[str, Samples]:
    """Call all jobs `repeats` times in turns, each time in a process of its own.

    The processes are forked off one that has imported the module `preload` and done nothing else, so that their peaks
    share the same imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    samples = {name: Samples() for name in jobs}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for _ in range(repeats):
            for name, job in jobs.items():
                samples[name].add(name, pool.submit(job).result())
    return samples


def peak_mb() -> float:
    """Return the highest resident memory of this process. (getrusage would count the parent's, from before exec.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def speed_row(what: str, ours: Samples, against: str, theirs: Samples, total_bytes: int) -> Row:
    """Compare in GB/s of the checkpoint's bytes; a ratio above 1 means faster than theirs."""
    return row(what, against, _rates(ours, total_bytes / 1e9), _rates(theirs, total_bytes / 1e9), "GB/s")


def token_row(what: str, ours: Samples, against: str, theirs: Samples, tokens: int) -> Row:
    """Compare in tokens trained per second; a ratio above 1 means faster than theirs."""
    return row(what, against, _rates(ours, tokens), _rates(theirs, tokens), "tokens/s")


def step_row(what: str, ours_s: Sequence[float], against: str, theirs_s: Sequence[float]) -> Row:
    """Compare the times of steps taken in the same rounds, in ms; a ratio above 1 means slower than theirs."""
    found = row(what, against, [s * 1e3 for s in ours_s], [s * 1e3 for s in theirs_s], "ms")
    return {**found, "ratio_ci95": _interval(np.asarray(ours_s), np.asarray(theirs_s))}


def memory_row(what: str, ours: Samples, against: str, theirs: Samples) -> Row:
    return row(f"{what}, peak memory", against, ours.peak_mb, theirs.peak_mb, "MB")


def row(what: str, against: str, ours: Sequence[float], theirs: Sequence[float], unit: str) -> Row:
    """Compare the medians of two samples."""
    return {
        "what": what,
        "against": against,
        "ours": _short(median(ours)),
        "theirs": _short(median(theirs)),
        "unit": unit,
        "ratio": _short(median(ours) / median(theirs)),
        "ours_range": [_short(min(ours)), _short(max(ours))],
        "theirs_range": [_short(min(theirs)), _short(max(theirs))],
        "repeats": len(ours),
    }


def _rates(samples: Samples, amount: float) -> list[float]:
    return [amount / seconds for seconds in samples.seconds]


def _interval(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Return the 95 % bootstrap interval of the ratio of medians, where both times of a round are drawn together."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(_RESAMPLES, len(ours)))
    ratios = np.median(ours[drawn], axis=1) / np.median(theirs[drawn], axis=1)
    return [_short(float(bound)) for bound in np.percentile(ratios, (2.5, 97.5))]


def _short(value: float) -> float:
    """Round to four digits."""
    return float(f"{value:.4g}")
