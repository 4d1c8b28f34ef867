"""Fine-tune on untrusted data without learning unwanted behaviours: calibrate, fold, train, unfold, prove."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from secvec import artifact
from secvec.atomic import write_json
from secvec.card import model_card
from secvec.drift_record import drift_of
from secvec.errors import CheckpointError, MissingExtraError, WeakVectorError
from secvec.fit import refit
from secvec.fold import fold
from secvec.processes import alone
from secvec.provenance import digest_file
from secvec.ranges import sync, sync_tree
from secvec.runfolder import CARD, RunFolder, digest_tree, fresh, locked, open_run, resumable
from secvec.samples import Rows
from secvec.train_config import Progress, TrainConfig, named
from secvec.tripwire import PROVENANCE, read_json
from secvec.unfold import UnfoldReport, unfold
from secvec.vector import SecurityVector

try:
    from secvec.covered import (
        covered_rows,
        covers,
        read_covered,
        replaceable,
        replaced,
        trained_rows,
        write_covered,
    )
    from secvec.drift import ROWS, Watch
    from secvec.plain import finish_plain
    from secvec.proof import Evidence, proof_lines, prove
    from secvec.recall import read_recalled, write_recalled
    from secvec.rehearsal import read_rehearsed, rehearse, write_rehearsed
    from secvec.settle import settles
    from secvec.train_inputs import Inputs, check_inputs
    from secvec.train_settle import settle, settle_rest
    from secvec.trainer import Job
    from secvec.trainer import run as run_trainer
except ImportError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("trl", "datasets", "peft"):
        raise
    raise MissingExtraError(package, "train") from error

__all__ = ["TrainConfig", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run made.

    model: the finished model folder, or the adapter under method "lora"; proof: the document in proof.json, None for
    a plain run; notes: what the user should know; seconds: by phase.
    """

    out: Path
    model: Path
    proof: Mapping[str, Any] | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]


def train(
    model: str | Path,
    data: Rows,
    out: str | Path,
    *,
    vectors: Sequence[SecurityVector | str | Path] = (),
    unwanted: Sequence[Rows] = (),
    config: TrainConfig | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Fine-tune `model` on `data` with the vectors in effect, take them out, and prove it.

    model: a folder or hub id; data: a file or rows; vectors: vectors or their files, none for plain training. unwanted:
    for each vector the rows it was fitted on; with them it is first calibrated for `data`, so that what it does not
    explain there is learned as if it were absent. out: a new run folder; the result is `out/model`, or `out/adapter`
    under method "lora", the proof `out/proof.json`. resume: go on with a run that was stopped at any moment.

    Raises RowError on unusable rows, ArtifactError and CheckpointError on vectors or models that do not fit, UsageError
    on contradicting options, InputError when the training diverges, ProofError when the result cannot be proved clean:
    then no model is published. A full disk is a CheckpointError; Ctrl-C stays a KeyboardInterrupt.

    Under a launcher all processes call this: they calibrate and train together, sharing the rows of each step, and the
    main one does all else alone, with its inputs. An error of the main process is raised in all.
    """
    inputs = alone(lambda: check_inputs(model, data, vectors, unwanted, config or TrainConfig()))
    out = Path(out).absolute()
    with resumable(out), ExitStack() as held:
        run = alone(lambda: _opened(out, inputs, held, resume=resume))
        if not run.identity.exists():
            raise CheckpointError(f"{run.out}: expected a folder that all processes see, found nothing there")
        if "publish" not in alone(run.finished):
            (_defended if inputs.vectors else _plain)(run, inputs, progress)
        elif inputs.vectors:
            _alone(run, "prove", lambda: _proved(run, inputs), lambda: _proved(run, inputs))
        _alone(run, "publish", lambda: _publish(run, inputs), lambda: _published(run, inputs))
        alone(run.clean)
        return alone(lambda: _result(run, inputs))


def check(
    model: str | Path,
    data: Rows,
    *,
    vectors: Sequence[SecurityVector | str | Path] = (),
    unwanted: Sequence[Rows] = (),
    config: TrainConfig | None = None,
) -> dict[str, Any]:
    """Check all that `train` would use and say what it would do; writes nothing. Raises as `train` does."""
    inputs = check_inputs(model, data, vectors, unwanted, config or TrainConfig())
    settings = inputs.config
    rows_per_step = settings.batch_size * settings.grad_accumulation
    steps = settings.trainer.get("max_steps", -1)
    if steps <= 0:
        steps = math.ceil(len(inputs.rows) / rows_per_step) * settings.epochs
    tokens = sum(len(row.ids) for row in inputs.rows)
    return {**inputs.identity(), "rows": len(inputs.rows), "tokens": tokens, "steps": steps, "notes": inputs.notes()}


def summary(result: TrainResult) -> str:
    """Return what a person wants to read at the end of a run: the notes, the proof, where the model is."""
    lines = list(result.notes)
    if result.proof is not None:
        lines += proof_lines(result.proof)
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    return "\n".join([*lines, took, f"{'model' if result.proof is None else 'defended model'}: {result.model}"])


def _opened(out: Path, inputs: Inputs, held: ExitStack, *, resume: bool) -> RunFolder:
    held.enter_context(locked(out))
    return open_run(out, inputs.identity(), resume=resume)


def _alone(run: RunFolder, name: str, work: Callable[[], str], check: Callable[[], str]) -> None:
    """Do one phase in the main process."""
    alone(lambda: run.phase(name, work, check))


def _together(run: RunFolder, name: str, work: Callable[[], None], check: Callable[[], str]) -> None:
    """Do one phase in all processes; `check` returns the digest of what it left."""
    if not alone(lambda: run.is_finished(name, check)):
        started = time.monotonic()
        work()
        alone(lambda: run.record(name, started, check()))


def _plain(run: RunFolder, inputs: Inputs, progress: Progress | None) -> None:
    _together(run, "train", lambda: _train(run, inputs, inputs.base, (), progress), lambda: digest_tree(run.trained))
    _alone(run, "finish", lambda: _finish(run, inputs), lambda: _left(run.unproved, run, inputs))


def _defended(run: RunFolder, inputs: Inputs, progress: Progress | None) -> None:
    inputs = _with_rows(run, inputs, progress)
    if inputs.config.calibrate:
        _together(run, "calibrate", lambda: _calibrate(run, inputs, progress), lambda: _calibrated(run, inputs))
    vectors = alone(lambda: _vectors(run, inputs))
    if inputs.config.calibrate and covers(vectors):
        _alone(run, "cover", lambda: _cover(run, inputs, vectors, progress), lambda: _covered(run))
    _alone(run, "fold", lambda: _fold(run, inputs, vectors, progress), lambda: digest_tree(run.folded))
    _together(
        run, "train", lambda: _train(run, inputs, run.folded, vectors, progress), lambda: digest_tree(run.trained)
    )
    _alone(run, "unfold", lambda: _unfold(run, inputs, progress), lambda: _left(run.unproved, run, inputs))
    if inputs.settles and (used := _calibrated_ones(inputs, vectors)):
        further = settle if settles(used) else settle_rest
        _together(
            run, "settle", lambda: further(run, inputs, vectors, progress), lambda: digest_tree(_last(run, inputs))
        )
    _alone(run, "prove", lambda: _prove(run, inputs, vectors), lambda: _proved(run, inputs))


def _with_rows(run: RunFolder, inputs: Inputs, progress: Progress | None) -> Inputs:
    """Let the vectors bring back the rows they were fitted on, where these were not given."""
    if not inputs.recalls:
        return inputs
    alone(lambda: run.work.mkdir(exist_ok=True))
    _alone(run, "recall", lambda: _recall(run, inputs, progress), lambda: digest_file(run.recalled))
    return replace(inputs, unwanted=alone(lambda: read_recalled(run.recalled)))


def _recall(run: RunFolder, inputs: Inputs, progress: Progress | None) -> str:
    write_recalled(run.recalled, inputs.recall(named(progress, "bringing back rows")))
    return digest_file(run.recalled)


def _calibrate(run: RunFolder, inputs: Inputs, progress: Progress | None) -> None:
    alone(lambda: run.work.mkdir(exist_ok=True))
    topics = list[SecurityVector]()
    # Topics first: what they act on is not to be learned beside a trait.
    for i in sorted(range(len(inputs.vectors)), key=lambda i: inputs.vectors[i].info.kind == "trait"):
        vector, unwanted = inputs.vectors[i], inputs.unwanted[i]
        if not unwanted.rows:
            alone(partial(artifact.save, vector, run.vector(i)))
            continue
        try:
            calibrated = refit(
                vector,
                inputs.base,
                unwanted=unwanted,
                calibrate=inputs.data,
                topics=topics if vector.info.kind == "trait" else (),
                max_length=inputs.config.max_length,
                state=run.work / f"calibration-{i}.state",
                progress=progress,
            )
        except WeakVectorError:
            if not inputs.recalls:
                raise
            # What it brought back is too little for a vector that works; the one given does.
            calibrated = vector
        if vector.info.kind == "topic":
            topics.append(calibrated)
        alone(partial(artifact.save, calibrated, run.vector(i)))


def _calibrated(run: RunFolder, inputs: Inputs) -> str:
    return " ".join(digest_file(run.vector(i)) for i in range(len(inputs.vectors)))


def _vectors(run: RunFolder, inputs: Inputs) -> list[SecurityVector]:
    if not inputs.config.calibrate:
        return list(inputs.vectors)
    return [artifact.load(run.vector(i)) for i in range(len(inputs.vectors))]


def _cover(run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector], progress: Progress | None) -> str:
    aligned, config = inputs.aligned(), inputs.config
    found = covered_rows(aligned, inputs.rows, vectors, named(progress, "looking for covered rows"))
    places = min(len(replaceable(found)), round(config.rehearse * (len(inputs.rows) - len(found))))
    listener = named(progress, "making up conversations")
    made = rehearse(
        aligned, inputs.tokenizer, vectors, places, max_length=config.max_length, seed=config.seed, progress=listener
    )
    write_rehearsed(run.rehearsed, made)
    found = replaced(found, places) if made else found
    write_covered(run.covered, found, [row.source for row in inputs.data.rows])
    return _covered(run)


def _covered(run: RunFolder) -> str:
    return f"{digest_file(run.covered)} {digest_file(run.rehearsed)}"


def _fold(run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector], progress: Progress | None) -> str:
    fold(inputs.base, vectors, fresh(run.folded), progress=named(progress, "folding"))
    return digest_tree(run.folded)


def _train(
    run: RunFolder, inputs: Inputs, source: Path, vectors: Sequence[SecurityVector], progress: Progress | None
) -> None:
    alone(lambda: fresh(run.trained))
    covered, rehearsed = alone(lambda: (read_covered(run.covered), read_rehearsed(run.rehearsed)))
    job = Job(
        source,
        inputs.unframed(trained_rows(inputs.rows, covered, rehearsed), vectors),
        inputs.tokenizer,
        inputs.config,
        run.checkpoints,
        run.trained,
        run.metrics,
        watch=alone(lambda: _watch(inputs, vectors)),
    )
    run_trainer(job, progress)
    alone(lambda: sync_tree(run.trained))


def _watch(inputs: Inputs, vectors: Sequence[SecurityVector]) -> Watch | None:
    if not any(each.rows for each in inputs.unwanted):
        return None
    return Watch(inputs.probes(inputs.aligned(), vectors, ROWS), vectors, inputs.config.on_drift)


def _finish(run: RunFolder, inputs: Inputs) -> str:
    finish_plain(run.trained, inputs.base, fresh(run.unproved))
    return digest_tree(run.unproved)


def _unfold(run: RunFolder, inputs: Inputs, progress: Progress | None) -> str:
    out = fresh(run.unproved)
    unfold(run.trained, out, folded=run.folded, base=inputs.base, progress=named(progress, "unfolding"))
    return digest_tree(out)


def _left(folder: Path, run: RunFolder, inputs: Inputs) -> str:
    """Return the digest of a result, which a run that was killed while it published may have moved already."""
    return digest_tree(folder if folder.exists() else _result_of(run, inputs))


def _prove(run: RunFolder, inputs: Inputs, vectors: Sequence[SecurityVector]) -> str:
    evidence = Evidence(
        method=inputs.config.method,
        base=inputs.base,
        folded=run.folded,
        trained=run.trained,
        result=run.unproved,
        vectors=vectors,
        report=_unfold_report(run.unproved),
        rows=inputs.rows,
        unwanted=inputs.unwanted_rows(),
        settled=run.settled if run.settled.exists() else None,
        given=inputs.vectors,
        tokenizer=inputs.tokenizer,
        covered=read_covered(run.covered),
        rehearsed=len(read_rehearsed(run.rehearsed)),
        recalled=_recalled_rows(inputs, vectors) if inputs.recalls else None,
        drift=drift_of(run.metrics) | {"action": inputs.config.on_drift} if inputs.unwanted else None,
    )
    run.proof.unlink(missing_ok=True)
    write_json(run.proof, prove(evidence))
    return _proved(run, inputs)


def _recalled_rows(inputs: Inputs, vectors: Sequence[SecurityVector]) -> list[int]:
    """Return on how many rows each vector was calibrated that it had brought back; 0 for one that is as it was."""
    found = zip(inputs.unwanted, inputs.vectors, vectors, strict=True)
    return [len(rows.rows) if _was_calibrated(given, used) else 0 for rows, given, used in found]


def _last(run: RunFolder, inputs: Inputs) -> Path:
    """Return the settled model, or the one that needed no settling, wherever a run that was killed has moved it."""
    return next(each for each in (run.settled, run.result(inputs.config.method), run.unproved) if each.exists())


def _calibrated_ones(inputs: Inputs, vectors: Sequence[SecurityVector]) -> list[SecurityVector]:
    """Return the vectors that were calibrated: they alone tell where they acted."""
    pairs = zip(inputs.vectors, vectors, strict=True)
    return [used for given, used in pairs if _was_calibrated(given, used)]


def _was_calibrated(given: SecurityVector, used: SecurityVector) -> bool:
    return artifact.digest(given) != artifact.digest(used)


def _proved(run: RunFolder, inputs: Inputs) -> str:
    return digest_file(run.proof)


def _unfold_report(folder: Path) -> UnfoldReport:
    document = read_json(folder / PROVENANCE)
    return TypeAdapter(UnfoldReport).validate_python(
        {field.name: document[field.name] for field in fields(UnfoldReport)}
    )


def _publish(run: RunFolder, inputs: Inputs) -> str:
    result = run.result(inputs.config.method)
    proof = read_json(run.proof) if inputs.vectors else None
    finished = run.settled if proof and proof.get("settled", {}).get("kept") else run.unproved
    if finished.exists():
        card = model_card(read_json(run.identity), inputs.config, inputs.data, inputs.notes(), proof)
        (finished / CARD).write_text(card, encoding="utf-8")
        sync_tree(finished)
        finished.rename(result)
        sync(run.out)
    return _published(run, inputs)


def _published(run: RunFolder, inputs: Inputs) -> str:
    return f"{digest_tree(_result_of(run, inputs))} {digest_file(run.metrics)}"


def _result_of(run: RunFolder, inputs: Inputs) -> Path:
    result = run.result(inputs.config.method)
    if not result.is_dir():
        raise CheckpointError(f"{result}: expected the finished model, found nothing; start anew in another folder")
    return result


def _result(run: RunFolder, inputs: Inputs) -> TrainResult:
    return TrainResult(
        out=run.out,
        model=run.result(inputs.config.method),
        proof=read_json(run.proof) if inputs.vectors else None,
        notes=inputs.notes(),
        seconds={name: phase.seconds for name, phase in run.finished().items()},
    )
