"""What is measured in a process of its own: a few steps of a variant, a fit, the bare loop that a fit is compared with.

Each returns its seconds and the process's peak resident MB; loading the model counts for the peak alone.
"""

import time
from pathlib import Path

from benchmarks.speed.checkpoint import RANK
from benchmarks.speed.measure import Taken, peak_mb
from benchmarks.speed.variants import Workload, load_quietly, trainee
from secvec.factors import fit_factors
from secvec.fit_config import FitConfig
from secvec.tokens import Encoded

STEPS = 3  # AdamW's state is there from the first step on: the second is the fullest

FIT_EPOCHS, FIT_BATCHES = 2, 9
"""A fit trains nine batches an epoch; a tenth batch of rows is held out."""


def train(folder: Path, method: str, way: str, workload: Workload) -> Taken:
    """Train a few steps of a variant."""
    with trainee(folder, method, way) as trained:
        seconds = sum(trained.step(workload.ids(step)) for step in range(STEPS))
    return seconds, peak_mb()


def fit(folder: Path, workload: Workload) -> Taken:
    """Fit a vector without anchors, with all that a fit does besides training: hold-out losses, the frozen backbone."""
    batches = [workload.ids(step).tolist() for step in range(FIT_BATCHES + 1)]
    rows = [Encoded(tuple(ids), (True,) * len(ids)) for batch in batches for ids in batch]
    config = FitConfig(rank=RANK, epochs=FIT_EPOCHS, patience=FIT_EPOCHS, batch_size=workload.rows, holdout=0.1)
    model = load_quietly(folder / "base")
    start_s = time.perf_counter()
    fit_factors(model, rows, [], config)
    return time.perf_counter() - start_s, peak_mb()


def bare_loop(folder: Path, workload: Workload) -> Taken:
    """Train PEFT's LoRA for as many steps on as many rows, and nothing else."""
    batches = [workload.ids(step) for step in range(FIT_BATCHES)]
    with trainee(folder, "lora", "plain") as trained:
        seconds = sum(trained.step(ids) for _ in range(FIT_EPOCHS) for ids in batches)
    return seconds, peak_mb()


def fit_tokens(workload: Workload) -> int:
    """Return the tokens that `fit` and `bare_loop` train on, each as often as it is trained on."""
    return FIT_EPOCHS * FIT_BATCHES * workload.rows * workload.tokens
