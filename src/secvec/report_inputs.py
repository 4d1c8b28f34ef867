"""What a report is made of: the folders of runs, scans and evaluations, recognised and checked; no torch.

Each figure is checked against what it follows from where that lies beside it: a proof and the metrics against the
digests in the run's state, a model against the one that was published, rates against scores, a scan's summary against
its rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from secvec.adapter import WEIGHTS
from secvec.comparison import Scored, compare
from secvec.errors import CheckpointError, InputError
from secvec.ledger import Ledger
from secvec.provenance import digest_file, digest_model
from secvec.report_files import (
    Compared,
    DemoResults,
    Identity,
    Metric,
    Proof,
    Rate,
    Results,
    ScanSummary,
    SuiteResult,
    altered,
    lines,
    load,
)
from secvec.runfolder import DEMO, EVALUATION, FORMAT, SCAN, Phase, RunFolder, digest_tree
from secvec.scan_page import Bins
from secvec.scan_rows import Totals, read_scan
from secvec.stats import wilson
from secvec.suites import read_suites
from secvec.tripwire import read_json

# Answers side by side, of each suite.
EXAMPLES = 5


@dataclass(frozen=True)
class Run:
    """A folder of `train`.

    metrics, proof: of a finished run. weights: the digest by which an evaluation knows the finished model; None, for
    the reason in `problem`, where the model is not there as it was published.
    """

    folder: Path
    identity: Identity
    phases: Mapping[str, Phase]
    metrics: Sequence[Metric] = ()
    proof: Proof | None = None
    weights: str | None = None
    problem: str | None = None

    @property
    def defended(self) -> bool:
        return bool(self.identity.vectors)


@dataclass(frozen=True)
class Asked:
    """A question, where it is known, and what each model answered."""

    suite: str
    id: str
    prompt: str | None
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Evaluation:
    """A folder of `eval`, or that of the demo. examples: answers, only where texts were asked for."""

    folder: Path
    results: Results
    examples: Sequence[Asked] = ()

    @property
    def file(self) -> Path:
        return self.folder / "results.json"

    def answers(self, suite: str) -> Path:
        """Return where a suite's answers lie, with a star for the model's name."""
        path = self.folder / "answers" / "*" / f"{suite}.jsonl"
        return path if path.parent.parent.is_dir() else self.file


@dataclass(frozen=True)
class Scan:
    """A folder of `scan`. bars: how many rows lose how much loss (`scan_page.Bins`)."""

    folder: Path
    summary: ScanSummary
    bars: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    runs: Sequence[Run] = ()
    scans: Sequence[Scan] = ()
    evaluations: Sequence[Evaluation] = ()


def read_inputs(folders: Sequence[str | Path], *, with_text: bool = False) -> Inputs:
    """Read folders that `train`, `scan`, `eval` and `demo` wrote, in any order, each once; with_text: answers too.

    Raises InputError on any other folder, CheckpointError on a file that is damaged or does not follow from the others.
    """
    runs: list[Run] = []
    scans: list[Scan] = []
    evaluations: list[Evaluation] = []
    for folder in _told_apart(folders):
        kind = _format(folder)
        if kind == FORMAT:
            runs.append(_run(folder))
        elif kind == SCAN:
            scans.append(_scan(folder))
        else:
            evaluations.append((_demo if kind == DEMO else _evaluation)(folder, with_text))
    return Inputs(runs, scans, evaluations)


def _told_apart(folders: Sequence[str | Path]) -> list[Path]:
    """Return the folders, each once, that of a demo with its two runs."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        inner = [folder / "plain", folder / "defended"] if _format(folder) == DEMO else []
        for each in [folder, *inner]:
            found.setdefault(each.resolve(), each)
    return list(found.values())


def _format(folder: Path) -> str:
    known = (FORMAT, SCAN, EVALUATION, DEMO)
    for path in (RunFolder(folder).identity, folder / "results.json"):
        found = read_json(path).get("format") if path.is_file() else None
        if found in known:
            return cast(str, found)
    what = "another folder" if folder.is_dir() else "a file" if folder.exists() else "nothing"
    hint = f"; its run folder is {folder.parent}" if RunFolder(folder.parent).identity.is_file() else ""
    raise InputError(
        f"{folder}: expected a folder that `secvec train`, `scan`, `eval` or `demo` finished or started, found "
        f"{what}{hint}; `secvec inspect` says what it is"
    )


def _run(folder: Path) -> Run:
    files = RunFolder(folder)
    run = Run(folder, load(Identity, files.identity), files.finished())
    if "publish" not in run.phases:
        return replace(run, problem="the run was stopped before its end: go on with `secvec train ... --resume`")
    proof = _proof(files, run) if run.defended else None
    published, _, metrics = run.phases["publish"].digest.partition(" ")
    run = replace(run, metrics=_metrics(files, metrics), proof=proof)
    result = files.result(run.identity.method)
    if not result.is_dir():
        return replace(run, problem=f"its model is not there any more: {result}")
    if digest_tree(result) != published:
        return replace(run, problem=f"its model was altered since it was published: {result}")
    weights = _weights(run, result)
    if proof is not None and not weights.endswith(proof.result):
        return replace(run, problem=f"its model is not the one that was proved: {result}")
    return replace(run, weights=weights)


def _metrics(files: RunFolder, expected: str) -> list[Metric]:
    metrics = lines(Metric, files.metrics)
    if (found := digest_file(files.metrics)) != expected:
        raise altered(files.metrics, f"expected the file of the run, {expected}, found {found}")
    return metrics


def _proof(files: RunFolder, run: Run) -> Proof:
    proof = load(Proof, files.proof)
    if (found := proof.models.get("base")) != run.identity.base:
        raise altered(files.proof, f"expected the proof of a model trained from {run.identity.base}, found {found}")
    expected = run.phases["prove"].digest if "prove" in run.phases else "the digest of a proof"
    if (found := digest_file(files.proof)) != expected:
        raise altered(files.proof, f"expected the file of the run, {expected}, found {found}")
    return proof


def _weights(run: Run, result: Path) -> str:
    if run.identity.method == "lora":
        return f"{run.identity.base} {digest_file(result / WEIGHTS)}"
    return digest_model(result)


def _evaluation(folder: Path, with_text: bool) -> Evaluation:
    path = folder / "results.json"
    results = load(Results, path)
    if odd := [name for name in [*results.models, *results.suites] if name == ".." or Path(name).name != name]:
        raise altered(path, f"expected names of models and suites, found {odd[0]!r}")
    if results.model not in results.models:
        raise altered(path, f"expected model {results.model!r} among the models")
    for name, suite in results.suites.items():
        scored = {model: lines(Scored, folder / "scores" / model / f"{name}.jsonl") for model in results.models}
        others = [model for model in results.models if model != results.model]
        expected = TypeAdapter(dict[str, Compared]).validate_python(compare(scored, results.model, others))
        if not _same(*({rate: _plain(each) for rate, each in rates.items()} for rates in (suite.rates, expected))):
            raise altered(path, f"the rates of suite {name!r} do not follow from {folder / 'scores'}")
    return Evaluation(folder, results, _examples(folder, results) if with_text else ())


def _demo(folder: Path, with_text: bool) -> Evaluation:
    found = load(DemoResults, folder / "results.json")
    by_model = {"aligned": found.aligned, "plain": found.plain, "defended": found.defended}
    try:
        rates = {
            rate: Compared({m: Rate(by_model[m][rate], found.ci95[m][rate], n) for m in by_model}, {})
            for rate, n in found.n.items()
        }
        examples = [
            Asked("demo", str(i), each["prompt"], {m: each[m] for m in by_model})
            for i, each in enumerate(found.examples, start=1)
        ]
        models = {name: found.models[name] for name in by_model}
    except KeyError as error:
        raise altered(folder / "results.json", f"expected an entry {error}") from error
    suites = {"demo": SuiteResult("", None, rates)}
    results = Results("defended", models, suites, {"seed": found.seed}, {}, {}, [])
    return Evaluation(folder, results, examples if with_text else ())


def _examples(folder: Path, results: Results) -> list[Asked]:
    """Return a few answers of each suite, first those in which the models differ most."""
    found: list[Asked] = []
    for name, suite in results.suites.items():
        ledgers = {model: Ledger(folder / "answers" / model / f"{name}.jsonl").entries() for model in results.models}
        prompts = _prompts(suite)
        asked = [
            Asked(
                name,
                str(entry.get("id")),
                prompts.get(key),
                {m: str(said[key]["answer"]) for m, said in ledgers.items()},
            )
            for key, entry in ledgers[results.model].items()
            if all("answer" in said.get(key, {}) for said in ledgers.values())
        ]
        found += sorted(asked, key=lambda each: -len(set(each.answers.values())))[:EXAMPLES]
    return found


def _prompts(suite: SuiteResult) -> dict[str, str]:
    """Return the questions of a suite by key, none where its file is not there any more as it was."""
    path = Path(suite.path or "")
    if not path.is_file() or digest_file(path) != suite.digest:
        return {}
    (read,) = read_suites([path])
    return {each.key: "\n".join(f"{turn.role}: {turn.content}" for turn in each.messages) for each in read.questions}


def _scan(folder: Path) -> Scan:
    path = folder / "summary.json"
    if not path.is_file():
        raise InputError(f"{folder}: expected a finished scan, found one that was stopped; the same command goes on")
    summary, rows, bins = load(ScanSummary, path), folder / "scan.jsonl", Bins()
    try:
        for row in read_scan(rows):
            bins.add(row)
        totals = Totals.of(read_scan(rows))
    except OSError as error:
        raise CheckpointError(f"{rows}: expected a readable file, found {error.strerror}; scan anew") from error
    here = (summary.rows, summary.scored, summary.explained, summary.tokens)
    here += tuple(vector.explained for vector in summary.vectors.values())
    there = (totals.rows, totals.scored, totals.explained, totals.tokens)
    there += tuple(totals.vectors[name] for name in summary.vectors)
    shares = (summary.explained / max(summary.scored, 1), wilson(summary.explained, summary.scored))
    if here != there or not _same((summary.share, summary.share_ci95), shares):
        raise altered(path, f"its figures do not follow from {rows}")
    return Scan(folder, summary, bins.bars())


def _plain(value: Any) -> dict[str, Any]:
    return asdict(value)


def _same(a: Any, b: Any) -> bool:
    """Compare documents; floats but for rounding, as drawn intervals may round otherwise on another machine."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, abs_tol=1e-6)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
