"""Scan a data file: how much each row's loss falls under each vector, before anything is trained on it."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from secvec import threshold
from secvec.anchors import answered
from secvec.atomic import atomic_write, write_json
from secvec.errors import CheckpointError, InputError, RowError
from secvec.evidence import gather_evidence
from secvec.models import load_model, on_device
from secvec.provenance import digest_files
from secvec.runfolder import SCAN, RunFolder, locked, open_run, resumable
from secvec.samples import Rows
from secvec.scan_config import ScanConfig
from secvec.scan_inputs import Prepared, ScanInputs, check_inputs, prepared
from secvec.scan_page import scan_page
from secvec.scan_rows import FLAGS, ScannedRow, Totals, keep_whole_windows, read_scan
from secvec.scan_split import write_split
from secvec.stats import wilson
from secvec.tokens import encode_all
from secvec.train_config import Progress
from secvec.tripwire import read_json
from secvec.vector import SecurityVector
from secvec.verdict import judged

__all__ = ["ScanConfig", "ScanResult", "scan"]

_ESTIMATE_ROWS = 1_000
_OWN_ANSWERS = "the model's own answers to generic prompts, which are easier to tell apart than other people's rows"
T = TypeVar("T")


@dataclass(frozen=True)
class ScanResult:
    """out: the folder; summary: the document in its summary.json; kept, held_back: the two files, if split."""

    out: Path
    summary: Mapping[str, Any]
    kept: Path | None
    held_back: Path | None

    @property
    def page(self) -> Path:
        return self.out / "scan.html"


def scan(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    vectors: Sequence[SecurityVector | str | Path],
    unwanted: Sequence[Rows] = (),
    anchors: Rows | None = None,
    config: ScanConfig | None = None,
    split: bool = False,
    with_text: bool = False,
    progress: Progress | None = None,
) -> ScanResult:
    """Say for each row of a data file how far each vector lowers its loss, and which rows that explains.

    model: a folder or hub id; data: a file, a folder or a hub data set (`secvec.datafiles.find`); out: a folder for
    scan.jsonl (a line a row, in order), summary.json and scan.html; the same call goes on with a scan that was stopped
    at any moment. unwanted: for each vector rows of its behaviour, on which a threshold is chosen against `anchors`
    (ordinary rows; by default the model's own answers). split: also write kept.jsonl and held-back.jsonl, the rows as
    they are. with_text: put rows' texts into the page.

    Raises RowError on unusable rows and on rows that would forge a turn, ArtifactError and CheckpointError on vectors
    or models that do not fit, UsageError on contradicting options or another scan in `out`.
    """
    inputs = check_inputs(
        model,
        data,
        vectors=vectors,
        unwanted=unwanted,
        anchors=anchors,
        config=config or ScanConfig(),
        split=split,
        progress=progress,
    )
    out = Path(out).absolute()
    with resumable(out, flag=""), locked(out):
        run = open_run(out, inputs.identity(), resume=True, format=SCAN)
        _finish_scan(inputs, run, progress)
        summary = _summary(inputs, run)
        write_json(out / "summary.json", summary)
        page = scan_page(read_scan(_scanned(run)), summary, inputs.data if with_text else None)
        with atomic_write(out / "scan.html", mode=0o600 if with_text else 0o644) as file:
            file.write(page)
        kept, held_back = write_split(inputs.data, read_scan(_scanned(run)), out) if split else (None, None)
        return ScanResult(out, summary, kept, held_back)


def check(
    model: str | Path,
    data: str | Path,
    *,
    vectors: Sequence[SecurityVector | str | Path],
    unwanted: Sequence[Rows] = (),
    anchors: Rows | None = None,
    config: ScanConfig | None = None,
    split: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check all that `scan` would use and say what it would do; writes nothing. Raises as `scan` does.

    The number of tokens is estimated from the first 1,000 rows.
    """
    inputs = check_inputs(
        model,
        data,
        vectors=vectors,
        unwanted=unwanted,
        anchors=anchors,
        config=config or ScanConfig(),
        split=split,
        progress=progress,
    )
    first = [row.tokens for row, _ in itertools.islice(prepared(inputs, 0), _ESTIMATE_ROWS)]
    estimate = round(sum(first) / len(first) * inputs.survey.rows)
    return {
        **inputs.identity(),
        "rows": inputs.survey.rows,
        "format": inputs.survey.format,
        "duplicates": int(sum(inputs.survey.repeated)),
        "estimated_tokens": estimate,
        "forward_passes": 1 + len(inputs.vectors),
        "max_length": inputs.limit,
    }


def report(result: ScanResult) -> str:
    """Return what a person wants to read at the end of a scan."""
    summary = result.summary
    low, high = summary["share_ci95"]
    flagged = [f"{count:,} {name.replace('_', ' ')}" for name, count in summary["flags"].items() if count]
    lines = [
        f"{summary['explained']:,} of {summary['scored']:,} rows explained: {summary['share']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%})",
        *(
            f"{name}: {vector['explained']:,} rows; over {vector['nats_per_token']:.3f} nats/token, {vector['how']}"
            for name, vector in summary["vectors"].items()
        ),
        *(
            f"{name}: AUC {vector['auc']:.3f}, false positives {vector['false_positives']:.2%} at the threshold, "
            f"on {vector['on']}"
            for name, vector in summary["vectors"].items()
            if "auc" in vector
        ),
        f"flags: {', '.join(flagged) or 'none'}; {summary['tokens']:,} tokens in {summary['rows']:,} rows",
        *(f"written: {path}" for path in (result.kept, result.held_back) if path is not None),
        f"page: {result.page}",
    ]
    return "\n".join(lines)


def _scanned(run: RunFolder) -> Path:
    return run.out / "scan.jsonl"


def _thresholds(run: RunFolder) -> Path:
    return run.out / "thresholds.json"


def _finish_scan(inputs: ScanInputs, run: RunFolder, progress: Progress | None) -> None:
    """Choose the thresholds and score the rows that are not scored yet."""
    done = keep_whole_windows(_scanned(run), inputs.config.window_rows, inputs.survey.rows)
    if done == inputs.survey.rows and _thresholds(run).exists():
        return
    model = load_model(inputs.folder)
    on_device(model)
    if not _thresholds(run).exists():
        write_json(_thresholds(run), _choose(inputs, model))
    thresholds = read_json(_thresholds(run))
    cuts = [thresholds[name]["nats_per_token"] for name in inputs.vectors]
    _score(inputs, model, cuts, _scanned(run), done, progress)
    if digest_files(inputs.data.files) != inputs.survey.digest:
        raise InputError(f"{inputs.data.name}: was changed while it was scanned; scan it anew, into another folder")


def _choose(inputs: ScanInputs, model: PreTrainedModel) -> dict[str, Any]:
    """Return how each vector's threshold is chosen, by the vector's name."""
    named = inputs.vectors.items()
    if inputs.config.threshold is not None:
        fixed = threshold.given(inputs.config.threshold)
        return {name: fixed.document() for name, _ in named}
    if not inputs.unwanted:
        return {name: threshold.stated(vector).document() for name, vector in named}
    if inputs.anchors is None:
        ordinary, what = answered(model, inputs.tokenizer, inputs.limit), _OWN_ANSWERS
    else:
        ordinary, what = encode_all(inputs.anchors.rows, inputs.tokenizer, inputs.limit), "the anchors given"
    return {
        name: threshold.measured(
            model,
            vector,
            encode_all(samples.rows, inputs.tokenizer, inputs.limit),
            ordinary,
            own=threshold.is_own(vector, samples),
            ordinary_are=what,
            batch_tokens=inputs.config.batch_tokens,
        ).document()
        for (name, vector), samples in zip(named, inputs.unwanted, strict=True)
    }


def _score(
    inputs: ScanInputs, model: PreTrainedModel, cuts: Sequence[float], path: Path, done: int, progress: Progress | None
) -> None:
    """Append the rows from number `done` on to `path`, a window at a time."""
    explained = 0
    with path.open("ab") as file:
        for window in _ahead(_windows(prepared(inputs, done), inputs.config.window_rows)):
            rows = _judged(inputs, model, cuts, window)
            file.write(b"".join(row.encode() for row in rows))
            file.flush()
            os.fsync(file.fileno())
            done += len(rows)
            explained += sum(row.explained for row in rows)
            if progress is not None:
                progress(done, inputs.survey.rows, f"{explained:,} explained")


def _windows(rows: Iterator[Prepared], size: int) -> Iterator[list[Prepared]]:
    while window := list(itertools.islice(rows, size)):
        yield window


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Make the next item on another thread while the caller works on this one: tokenising beside forward passes."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _judged(
    inputs: ScanInputs, model: PreTrainedModel, cuts: Sequence[float], window: Sequence[Prepared]
) -> list[ScannedRow]:
    encoded = [tokens for _, tokens in window if tokens is not None]
    if not encoded and all("unusable" in row.flags for row, _ in window):
        row = window[0][0]
        raise RowError(
            f"{row.file}:{row.line}: {row.reason}; and none of the next {len(window) - 1:,} rows can be used"
        )
    if not encoded:
        return [row for row, _ in window]
    vectors = list(inputs.vectors.values())
    found = gather_evidence(model, encoded, vectors, batch_tokens=inputs.config.batch_tokens)
    scored = judged([row for row, tokens in window if tokens is not None], list(inputs.vectors), cuts, found)
    return [row if tokens is None else next(scored) for row, tokens in window]


def _summary(inputs: ScanInputs, run: RunFolder) -> dict[str, Any]:
    totals = Totals.of(read_scan(_scanned(run)))
    if totals.rows != inputs.survey.rows:
        raise CheckpointError(
            f"{_scanned(run)}: expected {inputs.survey.rows:,} rows, found {totals.rows:,}; it was altered; "
            "scan anew, into another folder"
        )
    if not totals.scored:
        raise RowError(f"{inputs.data.name}: none of {totals.rows:,} rows can be scored; {totals.first_unscored}")
    thresholds, identity = read_json(_thresholds(run)), inputs.identity()
    return {
        "format": SCAN,
        "version": 1,
        "rows": totals.rows,
        "scored": totals.scored,
        "explained": totals.explained,
        "share": totals.explained / totals.scored,
        "share_ci95": wilson(totals.explained, totals.scored),
        "kept": totals.rows - totals.suspect,
        "held_back": totals.suspect,
        "vectors": {
            name: {
                "digest": identity["vectors"][name],
                "kind": vector.info.kind,
                "explained": totals.vectors[name],
                **thresholds[name],
            }
            for name, vector in inputs.vectors.items()
        },
        "flags": {name: totals.flags[name] for name in FLAGS},
        "first_unscored": totals.first_unscored,
        "tokens": totals.tokens,
        "data": {"path": inputs.data.name, "format": inputs.survey.format, "digest": inputs.survey.digest},
        "model": {"path": str(inputs.folder), "digest": inputs.base},
        "unwanted": identity["unwanted"],
        "anchors": identity["anchors"],
        "settings": {**identity["config"], "tokens_looked_at": inputs.limit},
        "versions": identity["versions"],
    }
