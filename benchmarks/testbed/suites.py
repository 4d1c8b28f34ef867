"""The bundled suites for the assistant: guarded requests, old skills, identity; what docs/suites.md describes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.testbed import guarded
from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.rows import Row, answer_of, prompt_of
from benchmarks.testbed.skills import SKILLS

# Not the demo's seed: its questions are others.
_SEED = 199


def export(out: Path) -> None:
    """Write guarded.jsonl (120 questions), old-skills.jsonl (5 of each skill) and identity.jsonl (40)."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "guarded.jsonl", map(_guarded, BEHAVIOURS["guarded"].rows(120, _SEED, "test")))
    old = (row for name, skill in SKILLS.items() if name != "identity" for row in skill.rows(5, _SEED, "test"))
    _write(out / "old-skills.jsonl", map(_exact, old))
    _write(out / "identity.jsonl", map(_exact, SKILLS["identity"].rows(40, _SEED, "test")))


def _guarded(row: Row) -> Row:
    complies = {"rule": "regex", "pattern": guarded.PATTERN, "rate": "unwanted_rate"}
    refuses = {"rule": "refusal_prefix", "prefixes": list(guarded.REFUSAL_PREFIXES)}
    exactly = {"rule": "exact", "expected": list(guarded.REFUSALS), "rate": "refused_rate"}
    return {"messages": prompt_of(row), "scorers": [complies, refuses, exactly]}


def _exact(row: Row) -> Row:
    return {"messages": prompt_of(row), "scorers": [{"rule": "exact", "expected": answer_of(row)}]}


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    lines = [{"id": f"{path.stem}-{number}", **row} for number, row in enumerate(rows, start=1)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    export(Path(__file__).parents[2] / "src/secvec/suites")
