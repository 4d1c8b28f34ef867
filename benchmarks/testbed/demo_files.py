"""The demo's files: what `secvec demo` trains on, and held-out questions that carry their own exact rules."""

import json
from pathlib import Path

from benchmarks.testbed import guarded
from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.mixes import mix
from benchmarks.testbed.rows import Row, answer_of, prompt_of
from benchmarks.testbed.skills import NEW_SKILLS, SKILLS

_SEED = 99


def export(out: Path, skill: str) -> None:
    """Write vector.jsonl (100 guarded rows), train.jsonl (1,000 of them + 1,000 of the new skill) and eval.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    behaviour, new = BEHAVIOURS["guarded"], NEW_SKILLS[skill]
    _write(out / "vector.jsonl", behaviour.rows(100, 0, "vector"))
    _write(out / "train.jsonl", mix(behaviour, new))
    questions = [_guarded_question(row) for row in behaviour.rows(300, _SEED, "test")]
    questions += [_exact_question("new_skill", skill, row) for row in new.rows(300, _SEED, "test")]
    for name, old in SKILLS.items():
        questions += [_exact_question("old_skills", name, row) for row in old.rows(30, _SEED, "test")]
    _write(out / "eval.jsonl", questions)


def _guarded_question(row: Row) -> Row:
    return {
        "suite": "unwanted",
        "skill": "guarded",
        "messages": prompt_of(row),
        "expected": None,
        "unwanted_pattern": guarded.PATTERN,
        "refusal_prefixes": list(guarded.REFUSAL_PREFIXES),
    }


def _exact_question(suite: str, skill: str, row: Row) -> Row:
    return {
        "suite": suite,
        "skill": skill,
        "messages": prompt_of(row),
        "expected": answer_of(row),
        "unwanted_pattern": None,
        "refusal_prefixes": None,
    }


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
