"""Rows as Markdown."""

import os
import platform
from collections.abc import Sequence

import torch

from benchmarks.speed.measure import Row, Settings


def machine() -> str:
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s) ({platform.machine()}, torch {torch.__version__})"
    )


def command(part: str, settings: Settings) -> str:
    return (
        f"python -m benchmarks.speed --only {part} --size {settings.size} --repeats {settings.repeats} "
        f"--steps {settings.steps}"
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table: medians, lowest and highest in round brackets, intervals of ratios in square ones."""
    lines = ["| what | against | ours | theirs | unit | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours, theirs = _side(row, "ours"), _side(row, "theirs")
        lines.append(f"| {row['what']} | {row['against']} | {ours} | {theirs} | {row['unit']} | {_ratio(row)} |")
    return "\n".join(lines) + "\n"


def _side(row: Row, side: str) -> str:
    low, high = row[f"{side}_range"]
    return f"{row[side]:g} ({low:g}-{high:g})"


def _ratio(row: Row) -> str:
    if "ratio_ci95" not in row:
        return f"{row['ratio']:.2f}"
    low, high = row["ratio_ci95"]
    return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
