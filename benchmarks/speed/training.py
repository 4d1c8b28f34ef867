"""The rows about training: what a folded or hooked vector costs a step, beside none and PEFT's second adapter."""

import random
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.speed import jobs
from benchmarks.speed.checkpoint import RANK, prepare
from benchmarks.speed.measure import Row, Settings, call_in_turns, memory_row, step_row, token_row
from benchmarks.speed.report import command, machine
from benchmarks.speed.variants import METHODS, WAYS, WORKLOADS, Workload, trainee

# Plain twice: how far the ratio of the two is from 1 is what this machine cannot tell apart.
TIMED = {"plain": "plain", "plain, again": "plain", **{way: way for way in WAYS if way != "plain"}}
WARM_UP_STEPS = 2
TITLES = {"full": "full fine-tuning", "lora": "LoRA"}
PEFT_TITLES = {"full": "PEFT, frozen adapter", "lora": "PEFT, two adapters"}


def about(settings: Settings) -> str:
    work = WORKLOADS[settings.size]
    return (
        "# Speed of training\n\n"
        f"Made by `{command('training', settings)}` on {machine()}: a random Llama of {work.shape.parameters():.1e} "
        f"parameters, fp32, {work.rows} x {work.tokens} random tokens a step, AdamW, rank {RANK} on all linear layers "
        f"for the vector and the task adapter. Times are medians of {settings.steps} steps of each variant, lowest "
        "and highest in brackets; all variants of a method train in one process, in a new order each round. Ratios of "
        "times have a 95 % bootstrap interval over rounds, and `plain, again`, a second plain model, shows what the "
        f"machine alone does to a ratio. Peak memory is the VmHWM of a process that loads the model and trains "
        f"{jobs.STEPS} steps, its imports included, medians of {settings.repeats} processes in turns. PEFT has the "
        "vector as a frozen, active adapter, beside the task adapter or under a backbone in training. `fit` is without "
        "anchors, but with hold-out losses and the check of the backbone, which the bare loop over as many tokens "
        "lacks.\n"
    )


def training_rows(settings: Settings) -> list[Row]:
    """Generate a model in `scratch`, measure, and delete it."""
    work = WORKLOADS[settings.size]
    with tempfile.TemporaryDirectory(prefix="secvec-speed-", dir=settings.scratch) as name:
        folder = Path(name)
        prepare(folder, work.shape, torch.float32)
        rows: list[Row] = []
        for method in METHODS:
            rows += _step_rows(step_times(folder, method, work, settings.steps), method)
            rows += _memory_rows(folder, method, work, settings.repeats)
        return rows + _fit_rows(folder, work, settings.repeats)


def step_times(folder: Path, method: str, work: Workload, steps: int) -> dict[str, list[float]]:
    """Return the seconds of `steps` steps of each variant, taken in rounds, each in another order."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in TIMED}
    with ExitStack() as stack:
        trainees = {name: stack.enter_context(trainee(folder, method, way)) for name, way in TIMED.items()}
        for step in range(WARM_UP_STEPS + steps):
            ids = work.ids(step)
            for name in order.sample(list(TIMED), len(TIMED)):
                times[name].append(trainees[name].step(ids))
    return {name: taken[WARM_UP_STEPS:] for name, taken in times.items()}


def _step_rows(times: dict[str, list[float]], method: str) -> list[Row]:
    for name, taken in times.items():
        print(f"  step, {method}, {name:16s} {median(taken) * 1e3:8.1f} ms", file=sys.stderr)
    what = f"step, {TITLES[method]}"
    against_plain = [
        step_row(f"{what}, {way}", times[way], "plain", times["plain"]) for way in ("plain, again", "folded", "hooked")
    ]
    return against_plain + [
        step_row(f"{what}, {way}", times[way], PEFT_TITLES[method], times["PEFT"]) for way in ("folded", "hooked")
    ]


def _memory_rows(folder: Path, method: str, work: Workload, repeats: int) -> list[Row]:
    tasks = {way: partial(jobs.train, folder, method, way, work) for way in WAYS}
    samples = call_in_turns(tasks, jobs.__name__, repeats)
    return [
        memory_row(f"{TITLES[method]}, {way}", samples[way], title, samples[other])
        for other, title in (("plain", "plain"), ("PEFT", PEFT_TITLES[method]))
        for way in ("folded", "hooked")
    ]


def _fit_rows(folder: Path, work: Workload, repeats: int) -> list[Row]:
    tasks = {"fit": partial(jobs.fit, folder, work), "bare loop": partial(jobs.bare_loop, folder, work)}
    samples = call_in_turns(tasks, jobs.__name__, repeats)
    ours, theirs, against = samples["fit"], samples["bare loop"], "PEFT LoRA, bare loop"
    return [token_row("fit", ours, against, theirs, jobs.fit_tokens(work)), memory_row("fit", ours, against, theirs)]
