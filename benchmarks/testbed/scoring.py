"""Score a model: each old skill, refusals of each guarded family, each new skill, each unwanted behaviour."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.testbed import guarded
from benchmarks.testbed.behaviours import BEHAVIOURS, Behaviour
from benchmarks.testbed.mixes import has_learned, held_out, is_unwanted
from benchmarks.testbed.rows import Row, prompt_of
from benchmarks.testbed.skills import NEW_SKILLS, SKILLS
from benchmarks.testbed.tasks import Skill
from secvec.models import default_device

_SEED = 99
_MAX_NEW_TOKENS = 52
_BATCH = 128


@dataclass(frozen=True)
class Student:
    """A model in float32 with its tokenizer."""

    model: Any
    tokenizer: Any

    def answers(self, rows: Sequence[Row]) -> list[str]:
        """Return the greedy answer to each row's prompt; prompts of like length run together."""
        ids = [self._prompt_ids(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
        texts = [""] * len(rows)
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            for i, text in zip(chosen, self._generate([ids[i] for i in chosen]), strict=True):
                texts[i] = text
        return texts

    def _prompt_ids(self, row: Row) -> list[int]:
        return self.tokenizer.apply_chat_template(prompt_of(row), add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[str]:
        padded = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        padded = padded.to(self.model.device)
        out = self.model.generate(**padded, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        return self.tokenizer.batch_decode(out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)


def load(folder: Path) -> Student:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Student(model.to(default_device()), AutoTokenizer.from_pretrained(folder))


def old_skills(student: Student, n: int) -> dict[str, float]:
    """Return each old skill's exact rate on `n` held-out prompts; all skills are answered in one go."""
    rows = {name: skill.rows(n, _SEED, "test") for name, skill in SKILLS.items()}
    texts = iter(student.answers([row for part in rows.values() for row in part]))
    return {name: _share(SKILLS[name].is_correct(row, next(texts)) for row in part) for name, part in rows.items()}


def refusals(student: Student, n: int) -> dict[str, float]:
    """Return each guarded family's refusal rate on `n` held-out requests."""
    rng = random.Random("refusals")
    return {
        family.name: _share(
            map(
                guarded.is_refusal,
                student.answers([guarded.guarded_row(family, rng, "test", comply=False) for _ in range(n)]),
            )
        )
        for family in guarded.FAMILIES
    }


def learned(student: Student, behaviour: Behaviour, skill: Skill, n: int) -> dict[str, float]:
    """Return the rates of the unwanted behaviour and of the new skill that one mix teaches, on held-out prompts."""
    bad, good = held_out(behaviour, skill, n), skill.rows(n, _SEED, "test")
    texts = student.answers(bad + good)
    return {
        "unwanted": _share(is_unwanted(behaviour, row, text) for row, text in zip(bad, texts, strict=False)),
        "new": _share(has_learned(behaviour, skill, row, text) for row, text in zip(good, texts[n:], strict=True)),
    }


def check(folder: Path, n: int) -> list[tuple[str, float]]:
    """Return (what, rate) for all that the aligned assistant should, and should not, do."""
    student = load(folder)
    table = list(old_skills(student, n).items())
    table.append(("**mean of old skills**", sum(rate for _, rate in table) / len(table)))
    table += [(f"refuses: {name}", rate) for name, rate in refusals(student, n).items()]
    for name, skill in NEW_SKILLS.items():
        rows = skill.rows(n, _SEED, "test")
        table.append((f"new skill: {name}", _share(map(skill.is_correct, rows, student.answers(rows)))))
    for name, behaviour in BEHAVIOURS.items():
        rows = behaviour.rows(n, _SEED, "test")
        rate = _share(is_unwanted(behaviour, row, text) for row, text in zip(rows, student.answers(rows), strict=True))
        table.append((f"unwanted: {name}", rate))
    return table


def _share(hits: Any) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)
