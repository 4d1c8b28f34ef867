"""Run each task several times, in turns, and turn seconds and peaks into rows."""

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]


@dataclass
class Samples:
    """What the repeats of one task took: seconds and peak resident MB."""

    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)


def run_in_turns(tasks: Mapping[str, Sequence[str]], out: Path, repeats: int) -> dict[str, Samples]:
    """Run all tasks `repeats` times in turns, so that a slow minute of the machine hits all alike.

    Each command ends with the folder it writes, `out`, which is removed afterwards. Dirty pages of the task before are
    written out first, unmeasured.
    """
    samples = {name: Samples() for name in tasks}
    for _ in range(repeats):
        for name, command in tasks.items():
            os.sync()
            seconds, peak_mb = _run(command)
            samples[name].seconds.append(seconds)
            samples[name].peak_mb.append(peak_mb)
            shutil.rmtree(out)
            print(f"  {name:24s} {seconds:7.2f} s {peak_mb:7.0f} MB", file=sys.stderr)
    return samples


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Return the seconds and peak MB that the task printed, or the seconds of the whole process and no peak."""
    start_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole_s = time.perf_counter() - start_s
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    printed = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured ")]
    return (float(printed[0][0]), float(printed[0][1])) if printed else (whole_s, math.nan)


def speed_row(what: str, ours: Samples, against: str, theirs: Samples, total_bytes: int) -> Row:
    """Compare in GB/s of the checkpoint's bytes; a ratio above 1 means faster than theirs."""
    return _row(what, against, _rates(ours, total_bytes), _rates(theirs, total_bytes), "GB/s")


def memory_row(what: str, ours: Samples, against: str, theirs: Samples) -> Row:
    return _row(f"{what}, peak memory", against, ours.peak_mb, theirs.peak_mb, "MB")


def _rates(samples: Samples, total_bytes: int) -> list[float]:
    return [total_bytes / 1e9 / seconds for seconds in samples.seconds]


def _row(what: str, against: str, ours: Sequence[float], theirs: Sequence[float], unit: str) -> Row:
    return {
        "what": what,
        "against": against,
        "ours": round(median(ours), 3),
        "theirs": round(median(theirs), 3),
        "unit": unit,
        "ratio": round(median(ours) / median(theirs), 3),
        "ours_range": [round(min(ours), 3), round(max(ours), 3)],
        "theirs_range": [round(min(theirs), 3), round(max(theirs), 3)],
        "repeats": len(ours),
    }
