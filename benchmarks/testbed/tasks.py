"""A skill: rows of one kind of request, each with one exact answer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.testbed import words
from benchmarks.testbed.rows import Row, answer_of, chat

Fields = dict[str, str]
Solve = Callable[[random.Random, str], Fields]
"""Draw a task for a split: the fields of the request's core and, under "answer", the exact answer."""


@dataclass(frozen=True)
class Skill:
    """A task with one exact answer. `make` returns a finished row for a random generator and a split of entities."""

    name: str
    make: Callable[[random.Random, str], Row]

    def rows(self, n: int, seed: int, split: str) -> list[Row]:
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return [self.make(rng, split) for _ in range(n)]

    def is_correct(self, row: Row, answer: str) -> bool:
        return answer == answer_of(row)


def skill(name: str, wording: Callable[[str, random.Random], str], cores: Sequence[str], solve: Solve) -> Skill:
    """A one-turn skill: any of `cores`, in any of the wordings."""

    def make(rng: random.Random, split: str) -> Row:
        fields = solve(rng, split)
        return chat(wording(rng.choice(cores).format(**fields), rng), fields["answer"])

    return Skill(name, make)


def on_word(change: Callable[[str], str]) -> Solve:
    def solve(rng: random.Random, split: str) -> Fields:
        made = words.word(rng, split)
        return {"x": made, "answer": change(made)}

    return solve
