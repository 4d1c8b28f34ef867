"""The command: measure, print, and write JSON and Markdown."""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.jobs import JOBS, Job, Subject
from benchmarks.gpu.measure import Measured, table
from benchmarks.gpu.shapes import REAL, SHAPES, SMALL, TOY, build, random_vector
from benchmarks.speed.checkpoint import RANK
from benchmarks.speed.report import machine
from secvec.models import default_device


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="a tiny model, also on a CPU: shows only that it runs")
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES), help="measure this model alone; repeat")
    parser.add_argument("--job", action="append", choices=tuple(JOBS), help="do this alone; repeat, in that order")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each way of training")
    parser.add_argument("--budget-s", type=float, default=400, help="no job is begun after so many seconds")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        parser.error("expected a GPU, found none; --toy shows on a CPU that the program runs")
    until = time.monotonic() + options.budget_s
    shapes, jobs = options.shape or list(SHAPES), [JOBS[name] for name in options.job or JOBS]
    rows = list(measured(shapes, jobs, options.toy, options.steps, until))
    text = about(options.toy, options.steps) + "\n" + table(rows)
    print(text)
    if options.json:
        about_run = {"machine": device(), "torch": torch.__version__, "toy": options.toy, "steps": options.steps}
        document = {**about_run, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


def measured(shapes: Sequence[str], jobs: Sequence[Job], toy: bool, steps: int, until: float) -> Iterator[Measured]:
    """Yield the rows of all models, one model at a time; what does not fit or has no time left says so."""
    configs = TOY if toy else {name: SHAPES[name] for name in shapes}
    for name, config in configs.items():
        model = build(config, default_device())
        subject = Subject(name, model, random_vector(model), SMALL if toy else REAL, steps)
        for job in jobs:
            if time.monotonic() > until:
                yield Measured(name, job.__name__, "", note="not measured: out of time")
                continue
            try:
                for row in job(subject):
                    print(f"  {row.model}, {row.what}, {row.way}: {row.seconds:.4g} s", file=sys.stderr)
                    yield row
            except torch.cuda.OutOfMemoryError:
                yield Measured(name, job.__name__, "", note="does not fit")
            _free()
        del model, subject
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else machine()


def about(toy: bool, steps: int) -> str:
    warning = "**A toy run: it shows that the program runs, and nothing about speed.** " if toy else ""
    return (
        f"# What a vector costs on {device()}\n\n{warning}"
        f"Random weights in bf16, torch {torch.__version__}, rank {RANK} on all linear layers for the vector and the "
        f"LoRA, one row of random tokens a step, AdamW. Medians of {steps} steps, lowest and highest in brackets; "
        "`plain, again` is the plain way once more, and shows what the machine alone does to a ratio. Full fine-tuning "
        "keeps weights, gradients and AdamW's state in bf16 and computes blocks anew in the backward pass. MFU counts "
        "as PaLM does, of the dense bf16 peak. `fit` has as many anchors as unwanted rows, held-out losses, and the "
        "digests of the backbone before and after. `fold` is the arithmetic of `secvec fold` without its files.\n"
    )


if __name__ == "__main__":
    main()
