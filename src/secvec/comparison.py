"""Score saved answers, and compare models over the same questions; pure functions of what was saved, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from secvec.judges import Judge, judged_key
from secvec.rules import GRADED, INCOHERENT, is_incoherent
from secvec.stats import bootstrap, mcnemar, sign_flip, wilson
from secvec.suites import Question, Suite

Entries = Mapping[str, Mapping[str, Any]]
_UNREADABLE = "the judge's words could not be read"


@dataclass(frozen=True)
class Scored:
    """What one question got: a score for each rate, None where it is unscored, for the reason in `unscored`."""

    id: str
    scores: Mapping[str, float | None]
    unscored: Mapping[str, str] = field(default_factory=dict[str, str])


def score(suite: Suite, answers: Entries, judged: Sequence[tuple[Judge, Entries]]) -> list[Scored]:
    """Score every question of a suite from saved answers and what judges said of them."""
    return [_score(question, answers[question.key], judged) for question in suite.questions]


def compare(scored: Mapping[str, Sequence[Scored]], model: str, baselines: Sequence[str]) -> dict[str, Any]:
    """Return, for each rate, every model's value with its 95 % interval, and paired tests of `model` with the others.

    The p-values are of single comparisons: with many of them some are small by chance.
    """
    rates = list(dict.fromkeys(rate for rows in scored.values() for row in rows for rate in row.scores))
    columns = {
        rate: {name: {row.id: row.scores.get(rate) for row in rows} for name, rows in scored.items()} for rate in rates
    }
    return {
        rate: {
            "models": {name: _value(rate, _asked(rate, scored[name])) for name in scored},
            "paired": {name: _paired(rate, columns[rate][model], columns[rate][name]) for name in baselines},
        }
        for rate in rates
    }


def _score(question: Question, entry: Mapping[str, Any], judged: Sequence[tuple[Judge, Entries]]) -> Scored:
    rates = _rates(question, [judge for judge, _ in judged])
    if "reason" in entry:
        return Scored(question.id, dict.fromkeys(rates), {rate: str(entry["reason"]) for rate in rates})
    if question.choice is not None:
        found = question.choice.scores(entry["nats"])
        return Scored(question.id, found, {rate: "not finite" for rate, each in found.items() if each is None})
    answer: str = entry["answer"]
    scores: dict[str, float | None] = {rule.rate: float(rule.score(answer)) for rule in question.rules}
    unscored: dict[str, str] = {}
    for judge, entries in judged:
        said = entries[judged_key(question.key, answer)]
        verdict = judge.read(said["output"]) if "output" in said else {}
        for label in judge.labels:
            scores[_judged_rate(judge, label)] = verdict.get(label)
            if label not in verdict:
                unscored[_judged_rate(judge, label)] = said.get("reason", _UNREADABLE)
    return Scored(question.id, {**scores, INCOHERENT: float(is_incoherent(answer))}, unscored)


def _rates(question: Question, judges: Sequence[Judge]) -> list[str]:
    if question.choice is not None:
        return ["mc1_rate", "mc2"]
    labels = [_judged_rate(judge, label) for judge in judges for label in judge.labels]
    return [*(rule.rate for rule in question.rules), *labels, INCOHERENT]


def _judged_rate(judge: Judge, label: str) -> str:
    return f"{judge.name}:{label}_rate"


def _asked(rate: str, rows: Sequence[Scored]) -> list[float | None]:
    return [row.scores[rate] for row in rows if rate in row.scores]


def _value(rate: str, scores: Sequence[float | None]) -> dict[str, Any]:
    known = [each for each in scores if each is not None]
    found: dict[str, Any] = {"value": None, "ci95": None, "n": len(known), "unscored": len(scores) - len(known)}
    if known:
        graded = rate in GRADED
        interval = bootstrap(known) if graded else wilson(round(sum(known)), len(known))
        found |= {"value": sum(known) / len(known), "ci95": interval, "interval": "bootstrap" if graded else "wilson"}
    return found


def _paired(rate: str, here: Mapping[str, float | None], there: Mapping[str, float | None]) -> dict[str, Any]:
    """Compare over the questions that both have a score for; difference: this model minus the baseline."""
    pairs = [(a, b) for key, a in here.items() if a is not None and (b := there.get(key)) is not None]
    differences = [a - b for a, b in pairs]
    if not pairs:
        return {"n": 0, "difference": None, "p": None}
    found: dict[str, Any] = {"n": len(pairs), "difference": sum(differences) / len(pairs)}
    if rate in GRADED:
        return {**found, "ci95": bootstrap(differences), "p": sign_flip(differences), "test": "sign flips"}
    up, down = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    return {**found, "only_here": up, "only_there": down, "p": mcnemar(up, down), "test": "McNemar, exact"}


def table(results: Mapping[str, Any]) -> Table:
    """Return results.json for the screen: rates with their 95 % intervals; against each baseline the paired p-value."""
    model, names = results["model"], list(results["models"])
    shown = Table("suite", "rate", *map(escape, names), caption_justify="left")
    for suite, found in results["suites"].items():
        for rate, columns in found["rates"].items():
            cells = [_cell(columns["models"][name], columns["paired"].get(name)) for name in names]
            shown.add_row(escape(suite), escape(rate), *cells)
        shown.add_section()
    for task in sorted({task for tasks in results["capability"].values() for task in tasks}):
        for metric in results["capability"][model].get(task, {}):
            shown.add_row(
                escape(task), escape(metric), *(f"{results['capability'][name][task][metric]:.3f}" for name in names)
            )
    shown.caption = f"in brackets 95 % intervals; p: exact paired test with {escape(model)}, one comparison at a time"
    return shown


def finding_lines(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each failure of the method: whether it is there, and what to do."""
    lines = [f"FAILED  {each['failure']}: {each['advice']}" for each in findings if each["failed"]]
    lines += [f"    ok  {each['advice']}" for each in findings if each["failed"] is False]
    open_ones = [each["failure"] for each in findings if each["failed"] is None]
    asks = f"not known: {'; '.join(open_ones)} (results.json says what each needs: --run, --vector, --unwanted)"
    return [*lines, *([asks] if open_ones else [])]


def _cell(found: Mapping[str, Any], paired: Mapping[str, Any] | None) -> str:
    if not found["n"]:
        return f"- ({found['unscored']} unscored)" if found["unscored"] else "-"
    low, high = found["ci95"]
    text = f"{found['value']:.3f} ({low:.3f}-{high:.3f}), n {found['n']}"
    text += f", {found['unscored']} unscored" if found["unscored"] else ""
    return text if paired is None or paired["p"] is None else f"{text}, p {paired['p']:.2g}"
