"""Judge a model beside others: put suites to them, score the answers, and name what went wrong with the defence."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secvec.answering import Subject, answer, named, pending
from secvec.atomic import atomic_write, write_json
from secvec.capability import Tasks, check_tasks, measure
from secvec.comparison import Scored, compare, score
from secvec.diagnose import Clues, Skills, check_clues, diagnose, vectors_of
from secvec.errors import UsageError
from secvec.judges import Judge
from secvec.judging import judge_answers, load_judges
from secvec.ledger import Ledger
from secvec.provenance import versions
from secvec.runfolder import EVALUATION, locked, resumable
from secvec.stats import mcnemar
from secvec.suites import Suite, read_suites
from secvec.train_config import Progress
from secvec.tripwire import read_json

__all__ = ["Clues", "EvalConfig", "EvalResult", "evaluate"]

_MOST_ARMED = 200
# What a folder holds that is a model's or a run's: it must stay as its digest says.
_OTHERS = ("config.json", "adapter_config.json", "run.json")


@dataclass(frozen=True)
class EvalConfig:
    """How models are asked.

    max_new_tokens   of an answer (256); longer answers are cut
    batch_size       questions, or given choices, asked together (64)
    tasks            of lm-eval, by name: needs the extra `eval`
    task_folder      with task files of your own, for lm-eval
    task_limit       questions a task of lm-eval; None: all
    """

    max_new_tokens: int = 256
    batch_size: int = 64
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    task_limit: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("batch_size", self.batch_size)):
            if value < 1:
                raise UsageError(f"EvalConfig.{name}: expected at least 1, found {value!r}")

    @property
    def capability(self) -> Tasks:
        folder = None if self.task_folder is None else Path(self.task_folder)
        return Tasks(self.tasks, folder, self.task_limit, self.batch_size)


@dataclass(frozen=True)
class EvalResult:
    """out: the folder; results: the document in its results.json."""

    out: Path
    results: Mapping[str, Any]


@dataclass(frozen=True)
class _Inputs:
    """All that an evaluation needs, checked before anything is written; the first subject is the model itself."""

    subjects: Sequence[Subject]
    suites: Sequence[Suite]
    judges: Sequence[Judge]
    clues: Clues
    config: EvalConfig

    @property
    def model(self) -> Subject:
        return self.subjects[0]


def evaluate(
    model: str | Path,
    suites: Sequence[str | Path],
    out: str | Path,
    *,
    baselines: Sequence[str | Path] = (),
    judges: Sequence[str] = (),
    clues: Clues | None = None,
    config: EvalConfig | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Put suites to a model and to others beside it, score the answers, and name what went wrong with the defence.

    model, baselines: folders, hub ids, adapters or run folders; suites: files, or names of bundled ones
    (docs/suites.md); judges: `KIND=MODEL` or `endpoint=FILE`. out: a folder for the answers, the scores and
    results.json; answers that are there are not asked for again, so that the same call goes on after a stop, and one
    with other rules or judges scores anew.

    Raises CheckpointError on models that do not load or hold a vector, RowError on unusable suites, UsageError on
    contradicting options, InputError when a judge cannot be reached.
    """
    inputs = _check(model, suites, baselines, judges, clues or Clues(), config or EvalConfig())
    out = Path(out).absolute()
    if any((out / name).exists() for name in _OTHERS):
        raise UsageError(f"{out}: expected a folder for the evaluation, found that of a model or run; name another one")
    summary = out / "results.json"
    if summary.exists() and read_json(summary).get("format") != EVALUATION:
        raise UsageError(f"{summary}: expected an evaluation's, found another; name another folder")
    with resumable(out, flag=""), locked(out):
        answers = {subject.name: _answers(inputs, subject, out, progress) for subject in inputs.subjects}
        judged = {judge.name: _judged(inputs, judge, answers, out, progress) for judge in inputs.judges}
        scored = {suite.name: _scored(inputs, suite, answers, judged, out) for suite in inputs.suites}
        capability = {
            subject.name: dict(measure(subject, inputs.config.capability, out / "capability" / f"{subject.name}.json"))
            for subject in inputs.subjects
            if inputs.config.tasks
        }
        skills = _skills(inputs, scored, out, progress)
        findings = diagnose(inputs.model.folder, inputs.clues, skills)
        results = {
            **_document(inputs, scored),
            "capability": capability,
            "findings": [asdict(finding) for finding in findings],
        }
        write_json(out / "results.json", results)
        return EvalResult(out, results)


def check(
    model: str | Path,
    suites: Sequence[str | Path],
    out: str | Path,
    *,
    baselines: Sequence[str | Path] = (),
    judges: Sequence[str] = (),
    clues: Clues | None = None,
    config: EvalConfig | None = None,
) -> dict[str, Any]:
    """Check all that `evaluate` would use and say what it would ask; writes nothing. Raises as `evaluate` does."""
    inputs = _check(model, suites, baselines, judges, clues or Clues(), config or EvalConfig())
    to_ask: dict[str, int] = {}
    for subject in inputs.subjects:
        for suite in inputs.suites:
            path = _place(Path(out), subject, suite)
            missing = pending(suite, Ledger(path)) if path.exists() else suite.questions
            to_ask[f"{subject.name}/{suite.name}"] = len(missing)
    return {
        "models": {subject.name: str(subject.folder) for subject in inputs.subjects},
        "suites": {suite.name: len(suite.questions) for suite in inputs.suites},
        "judges": [judge.name for judge in inputs.judges],
        "to_ask": to_ask,
        "config": asdict(inputs.config),
    }


def _check(
    model: str | Path,
    suites: Sequence[str | Path],
    baselines: Sequence[str | Path],
    judges: Sequence[str],
    clues: Clues,
    config: EvalConfig,
) -> _Inputs:
    read, loaded = read_suites(suites), load_judges(judges)
    check_tasks(config.capability)
    models = [model, *baselines]
    found = [Subject.find(each) for each in models]
    if len({subject.folder for subject in found}) < len(found):
        raise UsageError(f"expected different models, found one of them twice: {', '.join(map(str, models))}")
    # A hub id's folder in the cache goes by a digest.
    names = named([each.folder if Path(each.name).exists() else each.name for each in found])
    subjects = [replace(subject, name=name) for subject, name in zip(found, names, strict=True)]
    clues = _with_base(subjects, clues)
    check_clues(subjects[0].folder, clues)
    return _Inputs(subjects, read, loaded, clues, config)


def _with_base(subjects: Sequence[Subject], clues: Clues) -> Clues:
    """Name the baseline on which the vectors were fitted as the aligned model."""
    bases = {vector.info.base for vector in vectors_of(subjects[0].folder, clues)}
    aligned = next((subject.folder for subject in subjects[1:] if subject.digest in bases), None)
    return clues if clues.base is not None else replace(clues, base=aligned)


def _place(out: Path, subject: Subject, suite: Suite) -> Path:
    return out / "answers" / subject.name / f"{suite.name}.jsonl"


Answers = Mapping[str, Ledger]


def _answers(inputs: _Inputs, subject: Subject, out: Path, progress: Progress | None) -> Answers:
    """Ask one model; return the ledger of each suite, by its name."""
    about = subject.about(inputs.config.max_new_tokens)
    ledgers = {suite.name: Ledger.open(_place(out, subject, suite), about) for suite in inputs.suites}
    _ask(inputs, subject, [(suite, ledgers[suite.name]) for suite in inputs.suites], progress)
    return ledgers


def _ask(inputs: _Inputs, subject: Subject, work: Sequence[tuple[Suite, Ledger]], progress: Progress | None) -> None:
    config = inputs.config
    answer(subject, work, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, progress=progress)


def _judged(
    inputs: _Inputs, judge: Judge, answers: Mapping[str, Answers], out: Path, progress: Progress | None
) -> Mapping[tuple[str, str], Ledger]:
    """Let one judge read all answers; return the ledger of each model and suite."""
    about = {"format": "secvec.judged", "version": 1, **judge.identity()}
    folder = out / "judged" / judge.name
    found = {
        (model, suite.name): Ledger.open(folder / model / f"{suite.name}.jsonl", about)
        for model in answers
        for suite in inputs.suites
    }
    work = [
        (suite, ledgers[suite.name], found[model, suite.name])
        for model, ledgers in answers.items()
        for suite in inputs.suites
    ]
    judge_answers(judge, work, progress=progress)
    return found


def _scored(
    inputs: _Inputs,
    suite: Suite,
    answers: Mapping[str, Answers],
    judged: Mapping[str, Mapping[tuple[str, str], Ledger]],
    out: Path,
) -> dict[str, list[Scored]]:
    """Score one suite for every model, and write down what each question got."""
    found: dict[str, list[Scored]] = {}
    for model, ledgers in answers.items():
        verdicts = [(judge, judged[judge.name][model, suite.name].entries()) for judge in inputs.judges]
        found[model] = score(suite, ledgers[suite.name].entries(), verdicts)
        path = out / "scores" / model / f"{suite.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(b"".join(json.dumps(asdict(row)).encode() + b"\n" for row in found[model]))
    return found


def _skills(
    inputs: _Inputs, scored: Mapping[str, Mapping[str, Sequence[Scored]]], out: Path, progress: Progress | None
) -> Skills | None:
    """Ask the questions of skill once more with the vector in effect: what was learned in its presence shows there."""
    model = inputs.model
    vectors = tuple(vectors_of(model.folder, inputs.clues))
    if not vectors or not (model.folder / "config.json").is_file():
        return None
    with_vector = replace(model, name=f"{model.name}+vector", vectors=vectors)
    about = with_vector.about(inputs.config.max_new_tokens)
    parts = [part for suite in inputs.suites if (part := _skill_part(suite)).questions]
    work = [(part, Ledger.open(_place(out, with_vector, part), about)) for part in parts]
    _ask(inputs, with_vector, work, progress)
    pairs: list[tuple[float, float]] = []
    for part, ledger in work:
        rates = {question.id: question.skill_rate for question in part.questions}
        before = {row.id: row.scores for row in scored[part.name][model.name]}
        for row in score(part, ledger.entries(), []):
            a, b = (scores.get(rates[row.id] or "") for scores in (before[row.id], row.scores))
            pairs += [(a, b)] if a is not None and b is not None else []
    if not pairs:
        return None
    p = mcnemar(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    return Skills(len(pairs), sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs), p)


def _skill_part(suite: Suite) -> Suite:
    questions = [question for question in suite.questions if question.skill_rate is not None]
    return replace(suite, questions=tuple(questions[:_MOST_ARMED]))


def _document(inputs: _Inputs, scored: Mapping[str, Mapping[str, Sequence[Scored]]]) -> dict[str, Any]:
    model, *baselines = inputs.subjects
    names = [subject.name for subject in baselines]
    return {
        "format": EVALUATION,
        "version": 1,
        "model": model.name,
        "models": {each.name: {"path": str(each.folder), "digest": each.digest} for each in inputs.subjects},
        "suites": {
            suite.name: {
                "digest": suite.digest,
                "path": str(suite.path.absolute()),
                "questions": len(suite.questions),
                "rates": compare(scored[suite.name], model.name, names),
            }
            for suite in inputs.suites
        },
        "judges": {judge.name: dict(judge.identity()) for judge in inputs.judges},
        "settings": asdict(inputs.config),
        "versions": dict(versions()),
    }
