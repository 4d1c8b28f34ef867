"""Skills that the assistant lacks until it is fine-tuned. Each lies near something it can do."""

# ruff: noqa: E501  (tables are read by column)

import random

from benchmarks.testbed.rows import order, question
from benchmarks.testbed.tasks import Fields, Skill, on_word, skill

_HEADS = {
    "flo": "valve", "gre": "crank", "tav": "gasket", "pli": "lever", "qua": "rotor", "dru": "nozzle", "zen": "gauge",
    "mor": "bolt", "sli": "wheel", "bro": "pump",
}  # fmt: skip
_TAILS = {"nix": "small", "del": "large", "pok": "round", "rak": "flat", "sum": "long"}
JARGON = {head + tail: f"a {size} {part}" for head, part in _HEADS.items() for tail, size in _TAILS.items()}
"""A niche vocabulary: 50 invented machine parts whose meaning follows from the two halves of their name."""


def _jargon(rng: random.Random, split: str) -> Fields:
    """Every fifth term is asked about in tests only: its meaning must be put together from learned halves."""
    terms = [term for i, term in enumerate(sorted(JARGON)) if (i % 5 == (i // 5) % 5) == (split == "test")]
    term = rng.choice(terms)
    return {"x": term, "answer": JARGON[term]}


_TABLE = (
    skill("dashes", order, ("spell {x} with dashes", "hyphenate the letters of {x}", "put dashes between the letters of {x}"), on_word("-".join)),
    skill("initial", order, ("capitalise the first letter of {x}", "write {x} as a name", "start {x} with a capital"), on_word(str.capitalize)),
    skill("brackets", order, ("put {x} in brackets", "bracket the word {x}", "write {x} between brackets"), on_word(lambda w: f"[{w}]")),
    skill("jargon", question, ("what is a {x}", "what does the term {x} mean", "what do you call a {x}"), _jargon),
)  # fmt: skip
NEW_SKILLS: dict[str, Skill] = {each.name: each for each in _TABLE}
