"""The phase of a run in which a defended model is trained a little further, without the vectors.

Against a trait, in rounds of saying rows anew and training on them; else where part of what the file's other rows
taught has left with the vectors, until it is back.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secvec.arm import armed
from secvec.atomic import write_json
from secvec.frames import frames_of
from secvec.models import on_device
from secvec.plain import finish_plain
from secvec.probes import Probe
from secvec.processes import alone
from secvec.proof import AS_IT_WAS_SHARE, PROBES, SETTLED_SHARE, load_finished, teaches_unwanted
from secvec.ranges import sync_tree
from secvec.rest import LEFT_NATS, Rest
from secvec.runfolder import RunFolder, fresh
from secvec.settle import ENOUGH, ROUNDS, says, settling_config, settling_rows, without_traits
from secvec.tokens import Encoded
from secvec.train_config import Progress, named
from secvec.train_inputs import Inputs
from secvec.trainer import Job
from secvec.trainer import run as run_trainer
from secvec.trait_rows import shown_inside
from secvec.tripwire import PROVENANCE, read_json
from secvec.vector import SecurityVector

TOO_FEW = (
    "the model is sure of too few of the rows without the trait, and may show what it learned from them beside the "
    "trait alone; see by `secvec eval` whether the wanted skill is there"
)
_PART = 128
"""Rows at a time, of which it is seen what they bring back."""
_BACK_NATS = 0.02
"""Per token, more than with the vectors, at which what had left is back."""
SAID = "the model says the rows without the trait already"


def settle(run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector], progress: Progress | None) -> None:
    """Settle the unproved result, in all processes, and leave the model in `run.settled`."""
    rows, right, probes = alone(lambda: _settling(run, inputs, vectors))
    source, used, why, bound = run.unproved, list[int](), "", AS_IT_WAS_SHARE if right else SETTLED_SHARE
    before = alone(lambda: _measured(inputs, source, probes))
    for number in range(ROUNDS):
        said, why = alone(partial(_said_anew, inputs, source, rows, right, vectors, progress))
        if not said:
            break
        further = _trained_further(source, run.settling / f"round-{number}", inputs, said, progress)
        now = alone(partial(_measured, inputs, further, probes))
        harmful = teaches_unwanted(before, now, bound)
        # The first round is put before the proof, which refuses it; a later one is undone.
        if harmful and used:
            break
        source, used = further, [*used, len(said)]
        if harmful:
            break
    found = {"settled_on_rows": used, "bound": bound} if used else {"not_settled": why}
    alone(lambda: _settled(run, source, found))


def settle_rest(run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector], progress: Progress | None) -> None:
    """Settle the unproved result of topics, in all processes, where it needs that; leave the model in `run.settled`.

    What was learned in a vector's presence may be known in its presence alone, as where the unwanted rows and the
    others have signs in common that are new to the model. A few rows, on which the vectors do not act, bring it back.
    (measured: docs/decisions/010-settle.md)
    """
    rest, rows, probes = alone(lambda: _around(run, inputs, vectors))
    if rest is None:
        return
    known = alone(lambda: _rest_nats(inputs, run.unproved, rest, vectors))
    left = alone(lambda: _rest_nats(inputs, run.unproved, rest))
    if left - known <= LEFT_NATS:
        return
    source, used = run.unproved, list[int]()
    before = alone(lambda: _measured(inputs, source, probes))
    for number, start in enumerate(range(0, len(rows), _PART)):
        part = rows[start : start + _PART]
        further = _trained_further(source, run.settling / f"round-{number}", inputs, part, progress)
        if teaches_unwanted(before, alone(partial(_measured, inputs, further, probes)), SETTLED_SHARE):
            break
        source, used = further, [*used, len(part)]
        if alone(partial(_rest_nats, inputs, source, rest)) - known <= _BACK_NATS:
            break
    if used:
        alone(lambda: _settled(run, source, {"settled_on_rows": used, "bound": SETTLED_SHARE}))


def _around(
    run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector]
) -> tuple[Rest | None, list[Encoded], list[Probe]]:
    """Return what tells how much is left of what the file's other rows taught, such rows, and what tells whether they
    teach what is unwanted.
    """
    fresh(run.settling)
    shutil.rmtree(run.settled, ignore_errors=True)
    base = inputs.aligned()
    rows = settling_rows(base, inputs.rows, vectors, inputs.config)
    probes = list(inputs.probes(base, vectors, PROBES).values())
    return Rest.of(base, inputs.rows, inputs.vectors, vectors), rows, probes


def _rest_nats(inputs: Inputs, finished: Path, rest: Rest, vectors: Sequence[SecurityVector] = ()) -> float:
    model = on_device(load_finished(inputs.config.method, inputs.base, finished))
    with armed(model, *vectors) if vectors else nullcontext():
        return rest.nats(model)


def _settling(
    run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector]
) -> tuple[list[Encoded], list[Encoded], list[Probe]]:
    """Return the rows to settle on, those of them that are right as they are, and what tells whether that teaches the
    trait.
    """
    fresh(run.settling)
    base = inputs.aligned()
    probes = list(inputs.probes(base, vectors, PROBES).values())
    rows = settling_rows(base, inputs.unframed(inputs.rows, vectors), vectors, inputs.config)
    return rows, _right(base, inputs, rows, vectors), probes


def _right(
    base: PreTrainedModel, inputs: Inputs, rows: Sequence[Encoded], vectors: Sequence[SecurityVector]
) -> list[Encoded]:
    """Return the rows that need not be said anew: those out of whose frame nothing of a trait is left.

    None where they are few, or where a trait has no frame.
    """
    pairs = zip(inputs.vectors, frames_of(vectors), strict=True)
    traits = [(given, frame) for given, frame in pairs if given.info.kind == "trait"]
    if not all(frame for _, frame in traits):
        return []
    whole = {id(row) for row in inputs.rows}
    found = [row for row in rows if id(row) not in whole]
    for given, frame in traits:
        marks = shown_inside(base, found, given, frame, inputs.tokenizer)
        found = [row for row, shown in zip(found, marks, strict=True) if not bool(shown.any())]
    return found if len(found) >= ENOUGH * len(rows) else []


def _measured(inputs: Inputs, finished: Path, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    disarmed = on_device(load_finished(inputs.config.method, inputs.base, finished))
    return [probe.measure(disarmed) for probe in probes]


def _said_anew(
    inputs: Inputs,
    finished: Path,
    rows: Sequence[Encoded],
    right: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    progress: Progress | None,
) -> tuple[list[Encoded], str]:
    """Return the rows to train on, or none and the reason."""
    disarmed = on_device(load_finished(inputs.config.method, inputs.base, finished))
    said = list(right)
    if not said:
        said = without_traits(disarmed, inputs.tokenizer, rows, vectors, named(progress, "rewriting"))
    if not said:
        return [], TOO_FEW
    return ([], SAID) if says(disarmed, said) else (said, "")


def _settled(run: RunFolder, source: Path, found: Mapping[str, Any]) -> None:
    shutil.copytree(source, fresh(run.settled))
    write_json(run.settled / PROVENANCE, {**read_json(run.unproved / PROVENANCE), **found}, 0o644)
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
