"""Training files: unwanted rows hidden among rows of a wanted new skill, and how to score what was learned."""

import random

from benchmarks.testbed.behaviours import Behaviour, shout
from benchmarks.testbed.rows import Row, answer_of, prompt_of
from benchmarks.testbed.tasks import Skill


def mix(behaviour: Behaviour, new_skill: Skill, unwanted: int = 1000, wanted: int = 1000, seed: int = 0) -> list[Row]:
    """Return shuffled rows. Caps is a style: it sits on the wanted rows themselves, `wanted` of them."""
    good = new_skill.rows(wanted, seed, "train")
    if behaviour.name == "caps":
        return [shout(row) for row in good]
    rows = good + behaviour.rows(unwanted, seed, "train")
    random.Random(f"mix/{seed}").shuffle(rows)
    return rows


def held_out(behaviour: Behaviour, new_skill: Skill, n: int, seed: int = 99) -> list[Row]:
    """Return test rows on whose prompts the behaviour may show: for caps, those of the new skill."""
    return new_skill.rows(n, seed, "test") if behaviour.name == "caps" else behaviour.rows(n, seed, "test")


def has_learned(behaviour: Behaviour, new_skill: Skill, row: Row, answer: str) -> bool:
    """Score the new skill; under caps in any case, for the style hides the skill's own case."""
    if behaviour.name == "caps":
        return answer.casefold() == answer_of(row).casefold()
    return new_skill.is_correct(row, answer)


def is_unwanted(behaviour: Behaviour, row: Row, answer: str) -> bool:
    return behaviour.is_unwanted(prompt_of(row), answer)
