"""The phase of a run in which a model defended against a trait is settled: rounds of saying rows anew and training."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secvec.atomic import write_json
from secvec.frames import frames_of
from secvec.models import on_device
from secvec.plain import finish_plain
from secvec.probes import Probe
from secvec.processes import alone
from secvec.proof import PROBES, load_finished, teaches_trait
from secvec.ranges import sync_tree
from secvec.runfolder import RunFolder, fresh
from secvec.settle import ROUNDS, says, settling_config, settling_rows, without_traits
from secvec.tokens import Encoded
from secvec.train_config import Progress, named
from secvec.train_inputs import Inputs
from secvec.trainer import Job
from secvec.trainer import run as run_trainer
from secvec.tripwire import PROVENANCE, read_json
from secvec.vector import SecurityVector

TOO_FEW = (
    "the model is sure of too few of the rows without the trait, and may show what it learned from them beside the "
    "trait alone; see by `secvec eval` whether the wanted skill is there"
)
SAID = "the model says the rows without the trait already"


def settle(run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector], progress: Progress | None) -> None:
    """Settle the unproved result, in all processes, and leave the model in `run.settled`."""
    rows, probes = alone(lambda: _settling(run, inputs, vectors))
    source, used, why = run.unproved, list[int](), ""
    before = alone(lambda: _measured(inputs, source, probes))
    for number in range(ROUNDS):
        said, why = alone(partial(_said_anew, inputs, source, rows, vectors, progress))
        if not said:
            break
        further = _trained_further(source, run.settling / f"round-{number}", inputs, said, progress)
        harmful = teaches_trait(before, alone(partial(_measured, inputs, further, probes)))
        # The first round is put before the proof, which refuses it; a later one is undone.
        if harmful and used:
            break
        source, used = further, [*used, len(said)]
        if harmful:
            break
    alone(lambda: _settled(run, source, used, why))


def _settling(run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector]) -> tuple[list[Encoded], list[Probe]]:
    """Return the rows to settle on and what tells whether that teaches the trait."""
    fresh(run.settling)
    base = inputs.aligned()
    probes = list(inputs.probes(base, vectors, PROBES).values())
    rows = inputs.unframed(inputs.rows, vectors)
    return settling_rows(base, rows, vectors, inputs.config), probes


def _measured(inputs: Inputs, finished: Path, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    disarmed = on_device(load_finished(inputs.config.method, inputs.base, finished))
    return [probe.measure(disarmed) for probe in probes]


def _said_anew(
    inputs: Inputs,
    finished: Path,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    progress: Progress | None,
) -> tuple[list[Encoded], str]:
    """Return the rows to train on, or none and the reason."""
    disarmed = on_device(load_finished(inputs.config.method, inputs.base, finished))
    # Rows whose traits were all taken out before need not be said anew to be looked at.
    if all(frames_of([vector for vector in vectors if vector.info.kind == "trait"])) and says(disarmed, rows):
        return [], SAID
    said = without_traits(disarmed, inputs.tokenizer, rows, vectors, named(progress, "rewriting"))
    if not said:
        return [], TOO_FEW
    return ([], SAID) if says(disarmed, said) else (said, "")


def _settled(run: RunFolder, source: Path, used: Sequence[int], why: str) -> None:
    shutil.copytree(source, fresh(run.settled))
    found = {"settled_on_rows": list(used)} if used else {"settled_on_rows": [], "not_settled": why}
    write_json(run.settled / PROVENANCE, read_json(run.unproved / PROVENANCE) | found, 0o644)
    sync_tree(run.settled)


def _trained_further(
    source: Path, work: Path, inputs: Inputs, rows: Sequence[Encoded], progress: Progress | None
) -> Path:
    """Train a disarmed model or adapter on rows and return the folder of the result, which lies in `work`."""
    is_lora = inputs.config.method == "lora"
    alone(lambda: work.mkdir(parents=True))
    job = Job(
        inputs.base if is_lora else source,
        rows,
        inputs.tokenizer,
        settling_config(inputs.config),
        work / "checkpoints",
        work / "trained",
        work / "metrics.jsonl",
        adapter=source if is_lora else None,
    )
    run_trainer(job, progress)
    alone(lambda: finish_plain(job.trained, inputs.base, work / "finished"))
    return work / "finished"
