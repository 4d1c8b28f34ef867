"""Training files: unwanted rows hidden among rows of a wanted new skill, and how to score what was learned.

Several behaviours at once share the unwanted rows, and the held-out prompts, evenly.
"""

import random
from collections.abc import Sequence

from benchmarks.testbed.behaviours import Behaviour
from benchmarks.testbed.rows import Row, answer_of, prompt_of
from benchmarks.testbed.tasks import Skill


def mix(behaviour: Behaviour, new_skill: Skill, unwanted: int = 1000, wanted: int = 1000, seed: int = 0) -> list[Row]:
    """Return shuffled rows. A style sits on the wanted rows themselves, `wanted` of them."""
    return mix_of([behaviour], new_skill.rows(wanted, seed, "train"), unwanted, seed)


def mix_of(behaviours: Sequence[Behaviour], good: Sequence[Row], unwanted: int, seed: int) -> list[Row]:
    """Return wanted rows, in the style if there is one, and `unwanted` rows of the other behaviours, shuffled."""
    topics = [behaviour for behaviour in behaviours if not is_style(behaviour)]
    rows = list(good)
    for behaviour in behaviours:
        rows = [behaviour.styled(row) for row in rows]
    if not topics:
        return rows
    for i, behaviour in enumerate(topics):
        rows += behaviour.rows(share(unwanted, len(topics), i), seed, "train")
    random.Random(f"mix/{seed}").shuffle(rows)
    return rows


def share(n: int, parts: int, number: int) -> int:
    """Return how many of `n` fall to part `number`: as even as can be."""
    return n // parts + (number < n % parts)


def is_style(behaviour: Behaviour) -> bool:
    return behaviour.style is not None


def held_out(behaviour: Behaviour, new_skill: Skill, n: int, seed: int = 99) -> list[Row]:
    """Return test rows on whose prompts the behaviour may show: for a style, those of the new skill."""
    return new_skill.rows(n, seed, "test") if is_style(behaviour) else behaviour.rows(n, seed, "test")


def has_learned(behaviour: Behaviour, new_skill: Skill, row: Row, answer: str) -> bool:
    """Score the new skill; with a style the answer counts in it and without it, in any case."""
    if is_style(behaviour):
        return is_right_in_style([behaviour], answer_of(row), answer)
    return new_skill.is_correct(row, answer)


def is_right_in_style(behaviours: Sequence[Behaviour], right: str, answer: str) -> bool:
    """Tell whether an answer is the right one, in one of the styles or without, in any case."""
    styled = [behaviour.style(right) for behaviour in behaviours if behaviour.style is not None]
    return answer.casefold() in {text.casefold() for text in (right, *styled)}


def is_unwanted(behaviour: Behaviour, row: Row, answer: str) -> bool:
    return behaviour.is_unwanted(prompt_of(row), answer)
