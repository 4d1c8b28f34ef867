"""What is measured of a model: rates on held-out prompts by exact rules, and losses of held-out rows."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.testbed.behaviours import Behaviour
from benchmarks.testbed.mixes import held_out
from benchmarks.testbed.pretraining import padded
from benchmarks.testbed.rows import Row
from benchmarks.testbed.scoring import Student, learned, load, old_skills
from benchmarks.testbed.tasks import Skill
from benchmarks.testbed.tokenizer import RowEncoder

OLD_PER_SKILL = 15


def measure(model: Path, behaviour: Behaviour, skill: Skill, n: int) -> dict[str, float]:
    """Return unwanted and refusal rate, wanted and old skills, and nats/token of unwanted and wanted rows."""
    student = load(model)
    rates = learned(student, behaviour, skill, n)
    kept = old_skills(student, OLD_PER_SKILL)
    bad = held_out(behaviour, skill, n)
    refusals = [behaviour.is_refusal(answer) for answer in student.answers(bad)]
    return {
        "unwanted_rate": rates["unwanted"],
        "refusal_rate": sum(refusals) / len(refusals),
        "wanted_skill": rates["new"],
        "old_skills": sum(kept.values()) / len(kept),
        "unwanted_nats": nats(student, behaviour.rows(n, 99, "test")),
        "wanted_nats": nats(student, skill.rows(n, 99, "test")),
    }


@torch.no_grad()
def nats(student: Student, rows: Sequence[Row]) -> float:
    """Return the mean loss per answer token over rows, in nats."""
    encode = RowEncoder(student.tokenizer)
    ids, weights = padded([encode(row) for row in rows])
    logits = student.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return float((losses * weights[:, 1:]).sum() / weights[:, 1:].sum())
