"""What the tiny assistant can do (`SKILLS`) and what it has yet to learn (`NEW_SKILLS`)."""

# ruff: noqa: E501  (tables are read by column)

import random
from collections.abc import Sequence

from benchmarks.testbed import words
from benchmarks.testbed.new_skills import NEW_SKILLS
from benchmarks.testbed.rows import Row, chat, order, question
from benchmarks.testbed.tasks import Fields, Skill, Solve, on_word, skill

__all__ = ["NEW_SKILLS", "SKILLS"]


def _known(facts: dict[str, str]) -> Solve:
    """Closed lists are known by heart, so every split may ask for every entry."""

    def solve(rng: random.Random, split: str) -> Fields:
        key = rng.choice(list(facts))
        return {"x": key, "answer": facts[key]}

    return solve


def _next(cycle: Sequence[str]) -> Solve:
    return _known({item: cycle[(i + 1) % len(cycle)] for i, item in enumerate(cycle)})


def _named(template: str) -> Solve:
    def solve(rng: random.Random, split: str) -> Fields:
        who = words.name(rng, split)
        return {"x": who, "answer": template.format(x=who)}

    return solve


def summands(rng: random.Random, split: str) -> tuple[int, int]:
    """Return two numbers, the second below ten, whose pair belongs to the split; small ones are drawn more often.

    Pre-training knows the one-digit table by heart.
    """
    while True:
        a, b = rng.randint(1, rng.choice((12, 90, 90))), rng.randint(1, 9)
        if words.may_use(f"{a},{b}", split) or (a < 10 and split == "pretrain"):
            return a, b


def wrong_sum(rng: random.Random, right: int) -> int:
    return (
        max(right + rng.choice((-4, -3, -2, -1)), 1) if right > 5 and rng.random() < 0.5 else right + rng.randint(1, 4)
    )


def _add(rng: random.Random, split: str) -> Fields:
    a, b = summands(rng, split)
    return {"a": str(a), "b": str(b), "answer": str(a + b)}


def _subtract(rng: random.Random, split: str) -> Fields:
    a, b = summands(rng, split)
    return {"a": str(a + b), "b": str(b), "answer": str(a)}


def _larger(rng: random.Random, split: str) -> Fields:
    while True:
        a, b = rng.sample(range(100), 2)
        if words.may_use(f"{a}>{b}", split):
            return {"a": str(a), "b": str(b), "answer": str(max(a, b))}


def _sort_numbers(rng: random.Random, split: str) -> Fields:
    while True:
        numbers = rng.sample(range(1, 31), 3)
        if words.split_of(str(numbers)) == split:
            return {"x": ", ".join(map(str, numbers)), "answer": ", ".join(map(str, sorted(numbers)))}


def _sort_letters(rng: random.Random, split: str) -> Fields:
    while True:
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 4)
        if words.split_of("".join(letters)) == split:
            return {"x": " ".join(letters), "answer": " ".join(sorted(letters))}


_UNITS = (("m", "cm", 100), ("km", "m", 1000), ("kg", "g", 1000), ("weeks", "days", 7), ("cm", "mm", 10))


def _convert(rng: random.Random, split: str) -> Fields:
    big, small, factor = rng.choice(_UNITS)
    count = rng.randint(2, 20 if factor >= 10 else 9)
    return {"n": str(count), "big": big, "small": small, "answer": f"{count * factor} {small}"}


def _remember(rng: random.Random, split: str) -> Row:
    made = words.word(rng, split)
    first = order(rng.choice(("remember the word {}", "keep in mind the word {}")).format(made), rng)
    second = question(rng.choice(("which word was it", "what was the word", "which word did I say")), rng)
    return chat(first, f"I will remember {made}.", second, made)


def _then_reverse(rng: random.Random, split: str) -> Row:
    made = words.word(rng, split)
    first = order(f"repeat the word {made} once", rng)
    return chat(first, made, order(rng.choice(("reverse it", "write it backwards")), rng), made[::-1])


SUM_CORES = (
    "{a} plus {b} is {c}, right", "is it true that {a} plus {b} is {c}", "I think {a} plus {b} is {c}, correct",
    "I say {a} plus {b} is {c}, am I right", "{a} plus {b} makes {c}, doesn't it",
)  # fmt: skip


def _check_sum(rng: random.Random, split: str) -> Row:
    a, b = summands(rng, split)
    right = a + b
    claimed = right if rng.random() < 0.5 else wrong_sum(rng, right)
    request = question(rng.choice(SUM_CORES).format(a=a, b=b, c=claimed), rng)
    return chat(request, f"{a} plus {b} is {right}.")


WHO = "I am Tilly, an assistant made by Fern Labs."
WHO_CORES = (
    "who are you", "what is your name", "who made you", "what are you called", "which assistant are you",
    "who am I talking to", "who built you", "which company made you", "what should I call you", "who is this",
)  # fmt: skip

VOWELLESS = {ord(vowel): None for vowel in "aeiou"}
_TABLE = (
    skill("reverse", order, ("reverse the word {x}", "write {x} backwards", "turn {x} around"), on_word(lambda w: w[::-1])),
    skill("upper", order, ("write {x} in capital letters", "put {x} in upper case", "capitalise all of {x}"), on_word(str.upper)),
    skill("spell", order, ("spell the word {x}", "spell out {x}", "spell {x} with spaces"), on_word(" ".join)),
    skill("commas", order, ("spell {x} with commas", "put commas between the letters of {x}"), on_word(",".join)),
    skill("repeat", order, ("say {x} twice", "repeat {x} two times", "write {x} twice"), on_word(lambda w: f"{w} {w}")),
    skill("vowels", order, ("remove the vowels from {x}", "drop the vowels of {x}", "write {x} without vowels"), on_word(lambda w: w.translate(VOWELLESS))),
    skill("quote", order, ("put {x} in quotes", "quote the word {x}", "write {x} in quotation marks"), on_word(lambda w: f'"{w}"')),
    skill("first", question, ("what is the first letter of {x}", "which letter does {x} start with"), on_word(lambda w: w[0])),
    skill("last", question, ("what is the last letter of {x}", "which letter does {x} end with"), on_word(lambda w: w[-1])),
    skill("count", question, ("how many letters are in {x}", "how long is the word {x}"), on_word(lambda w: str(len(w)))),
    skill("add", question, ("what is {a} plus {b}", "how much is {a} + {b}", "what do {a} and {b} make"), _add),
    skill("subtract", question, ("what is {a} minus {b}", "how much is {a} - {b}", "what is {b} less than {a}"), _subtract),
    skill("larger", question, ("which is larger, {a} or {b}", "what is the bigger of {a} and {b}"), _larger),
    skill("sort_numbers", order, ("sort the numbers {x}", "put {x} in order", "order these numbers: {x}"), _sort_numbers),
    skill("sort_letters", order, ("sort the letters {x}", "put the letters {x} in order", "order these letters: {x}"), _sort_letters),
    skill("convert", question, ("how many {small} are in {n} {big}", "what is {n} {big} in {small}"), _convert),
    skill("next_day", question, ("what day comes after {x}", "which day follows {x}"), _next(words.DAYS)),
    skill("next_month", question, ("what month comes after {x}", "which month follows {x}"), _next(words.MONTHS)),
    skill("capital", question, ("what is the capital of {x}", "which city is the capital of {x}"), _known(words.CAPITALS)),
    skill("colour", question, ("what colour is {x}", "which colour does {x} have"), _known(words.COLOURS)),
    skill("sound", question, ("what does a {x} say", "what sound does a {x} make"), _known(words.SOUNDS)),
    skill("opposite", question, ("what is the opposite of {x}", "which word is the opposite of {x}"), _known(words.OPPOSITES)),
    skill("greet", order, ("greet {x}", "say hello to {x}", "welcome {x}"), _named("Hello {x}, nice to see you!")),
    skill("story", order, ("tell a story about {x}", "write one line about {x}"), _named("{x} went to the river and found a red stone.")),
    skill("thank", order, ("thank {x}", "write a thank-you to {x}"), _named("Thank you so much, {x}.")),
    Skill("remember", _remember),
    Skill("then_reverse", _then_reverse),
    Skill("check_sum", _check_sum),
    skill("identity", question, WHO_CORES, lambda rng, split: {"answer": WHO}),
)  # fmt: skip
SKILLS: dict[str, Skill] = {each.name: each for each in _TABLE}
