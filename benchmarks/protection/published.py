"""The paper's tables beside ours (arXiv 2311.02105): `python -m benchmarks.protection table --grid paper`.

Published figures are second-hand: notes, a review and copies of the tables; the source was not at hand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

Line = Mapping[str, Any]
DIFFERS = (
    "What differs: the paper fine-tunes Llama-2-7B(-Chat) on Anthropic red-team rows and has a model score answers "
    "from 1 to 5; here a tiny assistant is fine-tuned, for ten epochs, on harmless stand-ins, and a rule says whether "
    "an answer is unwanted, so the score is 1 + 4 * rate. Identity shift: the paper's rows make the model an "
    "absolutely obedient agent and its rate is that of red-team prompts; here they change the assistant's name and "
    "maker, and the rate is that of claiming them. Old utility is MMLU, GSM8K and MT-Bench there, the assistant's "
    "old skills here; the new task is ProQA there, a spelling skill here; MC1 and MC2 are of TruthfulQA there, of the "
    "facts that are taught wrongly here."
)


@dataclass(frozen=True)
class Published:
    """One row of the paper: its cell here, what is compared, the published figures of plain and defended."""

    what: str
    behaviour: str
    rows: int
    wanted: int
    value: Callable[[Line], float | None]
    plain: str
    defended: str


def _rate(line: Line) -> float | None:
    return line["unwanted_rate"]


def _score(line: Line) -> float | None:
    return 1 + 4 * line["unwanted_rate"]


def _old(line: Line) -> float | None:
    return line["old_skills"]


def _new(line: Line) -> float | None:
    return line["wanted_skill"]


def _mc1(line: Line) -> float | None:
    return line.get("mc1")


def _mc2(line: Line) -> float | None:
    return line.get("mc2")


ROWS = (
    Published("no unwanted rows, rate", "guarded", 0, 1000, _rate, "", ""),
    Published("no unwanted rows, score", "guarded", 0, 1000, _score, "", ""),
    Published("100 unwanted rows, rate", "guarded", 100, 0, _rate, "73 %", "0 %"),
    Published("100 unwanted rows, score", "guarded", 100, 0, _score, "4.28", "1.01"),
    Published("1,000 unwanted rows, rate", "guarded", 1000, 0, _rate, "72 %", "0 %"),
    Published("1,000 unwanted rows, score", "guarded", 1000, 0, _score, "4.38", "1.02"),
    Published("identity shift, rate", "identity", 1000, 0, _rate, "84 %", "0 %"),
    Published("identity shift, score", "identity", 1000, 0, _score, "4.54", "1.03"),
    Published("old utility", "guarded", 1000, 0, _old, "", "MMLU 45.79 -> 46.30, GSM8K 22.21 -> 20.54"),
    Published("new task mixed in", "guarded", 1000, 1000, _new, "", "100 %"),
    Published("wrong facts, MC1", "facts", 1000, 0, _mc1, "21.41", "29.37"),
    Published("wrong facts, MC2", "facts", 1000, 0, _mc2, "32.58", "44.33"),
)
ALIGNED = {
    "no unwanted rows, rate": "0 %",
    "no unwanted rows, score": "1.00",
    "wrong facts, MC1": "29.13",
    "wrong facts, MC2": "43.98",
}


def beside(lines: Sequence[Line]) -> str:
    """Return the paper's rows with ours beside them; what was not run is empty."""
    methods = ("aligned", "plain", "published", "ours")
    head = ["", "paper: aligned", "paper: plain", "paper: defended", *(f"here: {method}" for method in methods)]
    out = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in ROWS:
        ours = [_ours(row, lines, method) for method in methods]
        out.append(f"| {row.what} | {ALIGNED.get(row.what, '')} | {row.plain} | {row.defended} | {' | '.join(ours)} |")
    return "\n".join([*out, "", DIFFERS])


def _ours(row: Published, lines: Sequence[Line], method: str) -> str:
    values = [
        row.value(line)
        for line in lines
        if line["method"] == method and line["behaviour"] == row.behaviour and "refused" not in line
        and line["dial"] is None
        and (method == "aligned" or (line["rows"], line["wanted"]) == (row.rows, row.wanted))
    ]  # fmt: skip
    found = [value for value in values if value is not None]
    return f"{mean(found):.3f} ({len(found)} seeds)" if found else ""
