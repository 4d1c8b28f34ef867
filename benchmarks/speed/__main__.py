"""The command: measure, print, and write JSON and Markdown."""

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks.speed import files, training
from benchmarks.speed.measure import Row, Settings
from benchmarks.speed.report import table

# Each part's rows, and the paragraph that says what they mean.
PARTS = {"files": (files.file_rows, files.about), "training": (training.training_rows, training.about)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--only", choices=tuple(PARTS), help="measure this part alone")
    parser.add_argument("--size", choices=("1b", "tiny"), default="1b", help="of the files; training is on 3e7 or tiny")
    parser.add_argument("--repeats", type=int, default=5, help="of each task in a process of its own")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each variant of training")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="needs 13 GB for 1b")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all rows are about processors; a fit would take a GPU by itself
    parts = [options.only] if options.only else list(PARTS)
    rows, text = measured(parts, Settings(options.size, options.repeats, options.steps, options.scratch))
    print(text)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


def measured(parts: list[str], settings: Settings) -> tuple[list[Row], str]:
    """Return the rows of all parts, and the same as Markdown."""
    rows: list[Row] = []
    texts: list[str] = []
    for part in parts:
        measure, about = PARTS[part]
        found = measure(settings)
        rows += found
        texts.append(about(settings) + "\n" + table(found))
    return rows, "\n".join(texts)


if __name__ == "__main__":
    main()
