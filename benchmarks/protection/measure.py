"""What is measured of a model: rates on held-out prompts by exact rules, and losses of held-out rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods.method import AsTrained
from benchmarks.protection.cases import Case, joined
from benchmarks.protection.truthful import truthful
from benchmarks.testbed import guarded
from benchmarks.testbed.behaviours import Behaviour
from benchmarks.testbed.mixes import is_right_in_style, is_unwanted
from benchmarks.testbed.pretraining import padded
from benchmarks.testbed.rows import Row, answer_of
from benchmarks.testbed.scoring import Student, load, old_skills
from benchmarks.testbed.tokenizer import RowEncoder

_BATCH = 64


def measure(model: Path, case: Case, as_trained: AsTrained, n: int, *, old: int) -> dict[str, Any]:
    """Return all rates and losses of a finished model; None where a cell has nothing to measure them on.

    n: prompts for each rate; old: for each of the old skills.
    """
    student = load(model)
    bad, good = case.unwanted_held_out(n), case.wanted_held_out(n)
    trained, unwanted = case.unwanted_trained(n), case.unwanted()
    in_form = [as_trained(row, unwanted, case.cell.dial) for _, row in trained]
    asked = [joined(bad), in_form, good if case.skill is not None else []]
    answers, leaked, learned = _split(student.answers([row for part in asked for row in part]), asked)
    rates = [is_unwanted(behaviour, row, text) for (behaviour, row), text in zip(bad, answers, strict=True)]
    leaks = [is_unwanted(behaviour, row, text) for (behaviour, row), text in zip(trained, leaked, strict=True)]
    kept = old_skills(student, old)
    return {
        "unwanted_rate": _share(rates),
        "unwanted_rates": _by_behaviour(bad, rates),
        "refusal_rate": _share([guarded.is_refusal(answer) for answer in answers]),
        "wanted_skill": _wanted_rate(case, good, learned),
        "old_skills": sum(kept.values()) / len(kept),
        "leak_rate": _share(leaks),
        "unwanted_nats": nats(student, case.unwanted_losses(n)),
        "wanted_nats": nats(student, good),
        **(truthful(student) if "facts" in case.cell.behaviours else {}),
        "n": n,
        "n_old": old * len(kept),
    }


@torch.no_grad()
def nats(student: Student, rows: Sequence[Row]) -> float:
    """Return the mean loss per answer token over rows, in nats."""
    encode = RowEncoder(student.tokenizer)
    total, count = 0.0, 0.0
    for start in range(0, len(rows), _BATCH):
        batch = padded([encode(row) for row in rows[start : start + _BATCH]])
        ids, weights = (tensor.to(student.model.device) for tensor in batch)
        logits = student.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((losses * weights[:, 1:]).sum())
        count += float(weights[:, 1:].sum())
    return total / count


def _wanted_rate(case: Case, rows: Sequence[Row], answers: Sequence[str]) -> float | None:
    """Score the wanted skill; where a style sits on its rows, in that style or without, in any case."""
    if case.skill is None:
        return None
    if case.has_style:
        right = map(answer_of, rows)
        return _share([is_right_in_style(case.behaviours, a, text) for a, text in zip(right, answers, strict=True)])
    return _share([case.skill.is_correct(row, text) for row, text in zip(rows, answers, strict=True)])


def _split(texts: list[str], parts: Sequence[Sequence[Row]]) -> list[list[str]]:
    source = iter(texts)
    return [[next(source) for _ in part] for part in parts]


def _by_behaviour(rows: Sequence[tuple[Behaviour, Row]], hits: Sequence[bool]) -> dict[str, float]:
    names = dict.fromkeys(behaviour.name for behaviour, _ in rows)
    return {
        name: _share([hit for (behaviour, _), hit in zip(rows, hits, strict=True) if behaviour.name == name])
        for name in names
    }


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
