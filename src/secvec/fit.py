"""Fit a security vector on rows of an unwanted behaviour, and refit one for a training file."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.anchors import (
    COVERED,
    COVERED_AT_FIRST,
    LOOKED_AT,
    Calibration,
    beside_topics,
    calibration,
    neighbours,
    own_answers,
    reversible,
    untouched,
    whole,
)
from secvec.artifact import is_vector, save
from secvec.companions import tokens_a_row
from secvec.errors import InputError, UsageError
from secvec.factors import LEAST_ROWS, Fitted, Progress, fit_factors, split
from secvec.fit_config import KINDS, FitConfig
from secvec.frame_search import alike, frame
from secvec.frames import Frame, unframed
from secvec.hidden import behind, bound, search
from secvec.models import load_model, load_tokenizer, resolve
from secvec.processes import connected, differ, of_main, placed
from secvec.provenance import digest_chat_template, digest_model, digest_samples, digest_tokenizer, versions
from secvec.recall import Recalled
from secvec.runfolder import resumable
from secvec.samples import Rows, Sample, read_apart, read_rows
from secvec.score import habit
from secvec.sites import without_site
from secvec.tokens import Encoded, encode_all
from secvec.tripwire import refuse_folded
from secvec.vector import SecurityVector, VectorInfo

_TASK_EPOCHS = 3
"""Passes over a training file until the model knows it."""
_ROUNDS = 8
"""Of widening a vector that does not part the rows of a training file."""
_PATIENCE = 2
"""Such rounds in a row that cover no more than the best before them, after which to stop."""


def fit(
    model: str | Path,
    unwanted: Rows,
    *,
    anchors: Rows | None = None,
    kind: str = "topic",
    calibrate: Rows | None = None,
    config: FitConfig | None = None,
    allow_weak: bool = False,
    state: Path | None = None,
    progress: Progress | None = None,
) -> SecurityVector:
    """Fit a security vector (arXiv 2311.02105) for `model` on about 100 rows of an unwanted behaviour.

    kind: "topic", shown on some requests, or "trait", shown on any request (a style). anchors: ordinary rows; by
    default the model's own answers to generic prompts, for a topic. calibrate: a training file; its tokens on which a
    first quick vector does not act become anchors too, and a topic's rows that it recognises are fitted on. state: a
    file that keeps the progress of a long fit; an existing one is taken up.

    Raises RowError on unusable rows, CheckpointError on an unusable model, WeakVectorError when the vector does not
    show the behaviour on held-out rows (unless `allow_weak`).
    """
    if kind not in KINDS:
        raise UsageError(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    unwanted, given = read_apart(unwanted, anchors, kind)
    job = _Job.load(model, unwanted, kind, config or FitConfig())
    ordinary = job.encode(given.rows) if given else []
    training = [] if calibrate is None else job.training(calibrate)
    first: SecurityVector | None = None
    if kind == "trait" and (training or ordinary):
        first = job.vector(job.fit(_quick(job.config), [], progress=progress))
    chosen = job.ordinary_anchors(ordinary, first)
    if training:
        # A topic's first vector has its ordinary anchors, as one that `train` is given has.
        first = first or job.vector(job.fit(_quick(job.config), chosen, progress=progress))
        return job.calibrated(first, training, chosen, state, progress, allow_weak=allow_weak)
    return job.finished(job.fit(job.config, chosen, state=state, progress=progress), allow_weak=allow_weak)


def fit_to_file(
    model: str | Path,
    unwanted: Rows,
    out: Path,
    *,
    anchors: Rows | None = None,
    kind: str = "topic",
    calibrate: Rows | None = None,
    config: FitConfig | None = None,
    allow_weak: bool = False,
    progress: Progress | None = None,
) -> SecurityVector:
    """Fit a vector and write it to `out`; a fit that was killed goes on where it was when started again.

    Under a launcher the main process alone writes. Raises as `fit` and `save` do, before the long work where `out`
    cannot be written or is a file that is no vector's; a full disk is a CheckpointError.
    """
    accelerator = connected()
    if accelerator.is_main_process:
        _check_out(out)
    state = out.with_name(f".{out.name}.fit")
    with resumable(out, flag=""):
        vector = fit(
            model,
            unwanted,
            anchors=anchors,
            kind=kind,
            calibrate=calibrate,
            config=config,
            allow_weak=allow_weak,
            state=state,
            progress=progress,
        )
        if accelerator.is_main_process:
            save(vector, out)
            state.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return vector


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: expected the name of a file in an existing folder")
    if out.exists() and not (out.is_file() and is_vector(out)):
        raise UsageError(f"{out}: expected a new file, or a vector to write over, found something else; name another")


def check(
    model: str | Path,
    unwanted: Rows,
    *,
    anchors: Rows | None = None,
    kind: str = "topic",
    calibrate: Rows | None = None,
    config: FitConfig | None = None,
) -> dict[str, Any]:
    """Check all that `fit` would use and say what it would do; trains and writes nothing. Raises as `fit` does."""
    folder = resolve(model)
    config = _for_model(config or FitConfig(), kind, folder)
    refuse_folded(folder, "fit on")
    tokenizer = load_tokenizer(folder)
    unwanted, anchors = read_apart(unwanted, anchors, kind)
    report: dict[str, Any] = {"model": str(folder), "base": digest_model(folder), "config": asdict(config)}
    for name, rows in (("unwanted", unwanted), ("anchors", anchors), ("calibrate", calibrate)):
        if rows is not None:
            samples = read_rows(rows, name)
            encoded = encode_all(samples.rows, tokenizer, config.max_length)
            report[name] = {"rows": len(encoded), "format": samples.format, "tokens": sum(len(r.ids) for r in encoded)}
    return report


def refit(
    vector: SecurityVector,
    model: str | Path,
    *,
    unwanted: Rows | Recalled,
    calibrate: Rows,
    topics: Sequence[SecurityVector] = (),
    max_length: int | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> SecurityVector:
    """Calibrate a vector for one training file: fit it again with what it makes of that file's rows.

    `vector` itself says on which tokens it acts; its kind and fit settings are kept. unwanted: the rows that it was
    fitted on, or those that it brought back. topics: calibrated vectors to train a trait's with; rows on which they act
    do not count. max_length: tokens a row, as in the training to come, which is to take the trait's fixed text out of
    them (`frames_of` the result).

    Raises UsageError for a vector that `fit` did not make, else as `fit` does.
    """
    if vector.info.kind not in KINDS:
        raise UsageError(
            f"expected a vector made by `secvec fit`, found one of kind {vector.info.kind!r}: it cannot be calibrated; "
            "fit it again, or train without --unwanted"
        )
    config = FitConfig.recorded(vector.info.fit)
    config = config if max_length is None else replace(config, max_length=max_length)
    job = _Job.load(model, unwanted, vector.info.kind, config)
    # A vector that was weak from the start was allowed by its user.
    weak = bool(vector.info.metrics.get("weak", False))
    ordinary = job.ordinary_anchors([], vector)
    training = job.training(calibrate, topics)
    around = job.frame(vector, training, recalled=isinstance(unwanted, Recalled))
    if around:
        training = unframed(training, [around], job.tokenizer)
    calibrated = job.calibrated(vector, training, ordinary, state, progress, allow_weak=weak)
    metrics = {**calibrated.info.metrics, **({"frame": around.document()} if around else {})}
    return replace(calibrated, info=replace(calibrated.info, metrics=metrics))


@dataclass(frozen=True)
class _Job:
    """What every step of one fit shares, in every process: the model, its tokenizer and the encoded unwanted rows."""

    folder: Path
    base: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    unwanted: Sequence[Encoded]
    kind: str
    data: str
    config: FitConfig

    @classmethod
    def load(cls, source: str | Path, unwanted: Rows | Recalled, kind: str, config: FitConfig) -> "_Job":
        folder = resolve(source)
        config = _for_model(config, kind, folder)
        refuse_folded(folder, "fit on")
        tokenizer, base = load_tokenizer(folder), digest_model(folder)
        if isinstance(unwanted, Recalled):
            encoded, data = list(unwanted.rows), unwanted.digest()
        else:
            samples = read_rows(unwanted, "unwanted").rows
            encoded, data = encode_all(samples, tokenizer, config.max_length), digest_samples(samples)
        model = placed(load_model(folder))
        if differ(f"{base} {data} {kind} {config}"):
            raise InputError("expected the same model, rows and settings in every process, found different ones")
        return cls(folder, base, model, tokenizer, encoded, kind, data, config)

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        return of_main(encode_all(samples, self.tokenizer, self.config.max_length))

    def training(self, rows: Rows, topics: Sequence[SecurityVector] = ()) -> list[Encoded]:
        samples, count = list(read_rows(rows, "calibrate").rows), self.config.calibration_rows
        random.Random(f"{self.config.seed}/calibrate").shuffle(samples)
        looked_at = self.encode(samples[: LOOKED_AT * count if topics else count])
        return of_main(beside_topics(self.model, looked_at, topics, count)) if topics else looked_at

    def ordinary_anchors(self, given: Sequence[Encoded], quick: SecurityVector | None) -> list[Encoded]:
        if self.kind == "topic":
            own = whole(given) if given else own_answers(self.model, self.tokenizer, self.config.max_length)
            return of_main(own)
        return of_main(untouched(self.model, given, quick)) if given and quick is not None else []

    def fit(
        self,
        config: FitConfig,
        anchors: Sequence[Encoded],
        *,
        covered: Sequence[Encoded] = (),
        state: Path | None = None,
        progress: Progress | None = None,
    ) -> Fitted:
        return fit_factors(
            self.model,
            self.unwanted,
            anchors,
            config,
            covered=covered,
            mixed=self.kind == "trait",
            state=state,
            progress=progress,
        )

    def calibrated(
        self,
        first: SecurityVector,
        training: Sequence[Encoded],
        ordinary: Sequence[Encoded],
        state: Path | None,
        progress: Progress | None,
        *,
        allow_weak: bool,
    ) -> SecurityVector:
        """Fit a vector for a training file, starting from what a first one makes of it.

        Where that does not part the file's rows, it is widened first: fitted again on what it covers, to cover more.
        """
        risen = self.reversible(training, first, progress)
        alike = of_main(neighbours(self.model, training)) if self.kind == "topic" else None
        found = best = self.calibration(training, first, COVERED_AT_FIRST, risen, alike)
        stale = 0 if found.covered else _PATIENCE
        for _ in range(_ROUNDS):
            if found.settled or stale == _PATIENCE:
                break
            anchors = [*ordinary, *found.anchors]
            wider = self.vector(self.fit(_quick(self.config), anchors, covered=found.covered, progress=progress))
            found = self.calibration(training, wider, COVERED, risen, alike)
            better = found.settled or len(found.covered) > len(best.covered)
            best, stale = (found, 0) if better else (best, stale + 1)
        shown, best = len(best.covered), self.with_hidden(best, training, ordinary, progress)
        anchors = [*ordinary, *best.anchors]
        fitted = self.fit(self.config, anchors, covered=best.covered, state=state, progress=progress)
        vector = self.finished(fitted, allow_weak=allow_weak)
        metrics = {
            **vector.info.metrics,
            "calibration_rows": len(best.anchors),
            "covered_rows": len(best.covered),
            "unsure_rows": best.unsure,
            "calibrated_on_rows": len(training),
            "acted_share": best.acted_share,
        }
        if hidden := len(best.covered) - shown:
            metrics |= {"covered_rows": shown, "hidden_rows": hidden}
            if (least := of_main(bound(self.model, self.unwanted, ordinary, vector))) is not None:
                metrics["hidden_nats"] = least
        return replace(vector, info=replace(vector.info, metrics=metrics))

    def with_hidden(
        self, found: Calibration, training: Sequence[Encoded], ordinary: Sequence[Encoded], progress: Progress | None
    ) -> Calibration:
        """Return what calibration found, with a topic's rows as covered too that hide an unwanted answer."""
        shown = of_main(behind(self.unwanted, ordinary, self.tokenizer, self.config.max_length, self.config.seed))
        if self.kind != "topic" or not shown:
            return found
        probe = replace(self, unwanted=[*self.unwanted, *shown])
        vector = self.vector(probe.fit(_quick(self.config), ordinary, progress=progress))
        return of_main(search(self.model, training, vector, self.unwanted, ordinary, found))

    def calibration(
        self,
        training: Sequence[Encoded],
        vector: SecurityVector,
        cut: float,
        risen: Sequence[Tensor] | None,
        alike: Tensor | None,
    ) -> Calibration:
        return of_main(calibration(self.model, training, vector, kind=self.kind, cut=cut, risen=risen, alike=alike))

    def frame(self, vector: SecurityVector, training: Sequence[Encoded], *, recalled: bool) -> Frame:
        """Return a trait's fixed text in answers; recalled: `vector` brought back the unwanted rows itself.

        What answers to all kinds of requests have in common is that then; where the file has none such, its answers
        may have another: of signs never met a vector brings back others.
        """
        if self.kind != "trait":
            return Frame()
        given = self.model, self.tokenizer, vector
        if not recalled:
            return of_main(frame(*given, self.unwanted, training=training))
        # A text inside has to be one by itself.
        inside = frame(*given, self.unwanted, training=training).inside
        common = replace(alike(*given, self.unwanted), inside=inside)
        is_there = unframed(training, [common], self.tokenizer) != training
        return of_main(common if is_there else frame(*given, training, like=common))

    def reversible(
        self, training: Sequence[Encoded], first: SecurityVector, progress: Progress | None
    ) -> list[Tensor] | None:
        """Return what tells a trait from what else the training file teaches (`anchors.reversible`), if anything."""
        if self.kind != "trait" or len(training) < LEAST_ROWS:
            return None
        config = replace(self.config, epochs=_TASK_EPOCHS, kl_weight=0.0, representation_weight=0.0, margin=1.0)
        task = self.vector(fit_factors(self.model, training, [], config, mixed=True, progress=progress))
        return of_main(reversible(self.model, training, first, task))

    def finished(self, fitted: Fitted, *, allow_weak: bool) -> SecurityVector:
        """Return the vector with what shows that it works. Raises WeakVectorError when nothing does.

        A topic must halve the mean loss of held-out rows; for a trait, which may take few of their tokens, it is enough
        to do so where it acts.
        """
        vector, metrics, works = self.vector(fitted), fitted.metrics(), fitted.works
        if self.kind == "trait":
            shown = of_main(habit(self.model, split(self.unwanted, self.config)[1], vector))
            works = works or shown.shows
            metrics |= {f"habit_{name}": value for name, value in asdict(shown).items()}
        if not works and not allow_weak:
            # Are the anchors the reason?
            raise fitted.weak(alone=self.fit(_quick(self.config), []) if fitted.anchors else None)
        names, share = without_site(self.model)
        if names:
            metrics |= {"no_site": f"{', '.join(names)}: {share:.0%} of the blocks' weights, where the vector is not"}
        return replace(vector, info=replace(vector.info, metrics={**metrics, "weak": not works}))

    def vector(self, fitted: Fitted) -> SecurityVector:
        info = VectorInfo(
            kind=self.kind,
            base=self.base,
            tokenizer=digest_tokenizer(self.folder),
            chat_template=digest_chat_template(self.tokenizer.chat_template),  # pyright: ignore[reportArgumentType]
            data=self.data,
            fit=asdict(self.config),
            metrics=fitted.metrics(),
            versions=versions(),
        )
        return SecurityVector(fitted.factors, fitted.scale, info)


def _for_model(config: FitConfig, kind: str, folder: Path) -> FitConfig:
    """Return the settings with those that depend on the kind, and rows no longer than the model can take."""
    return replace(config.for_kind(kind), max_length=tokens_a_row(folder, config.max_length))


def _quick(config: FitConfig) -> FitConfig:
    """The settings of the first vector, which only has to tell unwanted rows from others."""
    return replace(config, epochs=min(config.passes, 10), representation_weight=0.0, margin=1.0)
