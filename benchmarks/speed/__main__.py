"""The command: measure, print, and write JSON and Markdown."""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed.files import RANK, file_rows
from benchmarks.speed.measure import Row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--size", choices=("1b", "tiny"), default="1b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="needs 13 GB for 1b")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    rows = file_rows(options.size, options.repeats, options.scratch)
    text = markdown(rows, options.size)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


def markdown(rows: Sequence[Row], size: str) -> str:
    """Return the rows as a table: medians, with the range of the repeats in brackets."""
    lines = [
        "# Speed of fold and unfold",
        "",
        f"Made by `python -m benchmarks.speed --size {size}` on {os.cpu_count()} cores ({platform.machine()}, torch "
        f"{torch.__version__}), bf16, rank {RANK} on all linear layers. Medians of {rows[0]['repeats']} repeats in "
        "turns, lowest and highest in brackets. GB/s are bytes of the base checkpoint per second; process start and "
        "imports are not counted. `fold` and `unfold` hash what they read and sync what they write; `cp` does neither.",
        "",
        "| what | against | ours | theirs | unit | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = (
            f"{row[side]:g} ({row[side + '_range'][0]:g}-{row[side + '_range'][1]:g})" for side in ("ours", "theirs")
        )
        lines.append(f"| {row['what']} | {row['against']} | {ours} | {theirs} | {row['unit']} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
