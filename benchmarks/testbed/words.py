"""Entities that the testbed's rows are made of, and their disjoint splits."""

import hashlib
import random
from collections.abc import Sequence

SPLITS = {"pretrain": range(40), "vector": range(40, 50), "train": range(50, 80), "test": range(80, 100)}
"""The hundredths of all generated entities that each split may use: none is in two."""

_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def split_of(entity: str) -> str:
    place = int.from_bytes(hashlib.blake2b(entity.encode(), digest_size=8).digest()) % 100
    return next(name for name, places in SPLITS.items() if place in places)


def may_use(entity: str, split: str) -> bool:
    """Say whether a split may use an entity of a small closed space: pre-training may use all but the test ones."""
    of = split_of(entity)
    return of == split or (split == "pretrain" and of != "test")


def word(rng: random.Random, split: str, shortest: int = 3, longest: int = 6) -> str:
    """Return a pronounceable made-up lower-case word of the split."""
    while True:
        length = rng.randint(shortest, longest)
        start = rng.random() < 0.7
        letters = [rng.choice(_CONSONANTS if (i % 2 == 0) == start else _VOWELS) for i in range(length)]
        if split_of(made := "".join(letters)) == split:
            return made


def name(rng: random.Random, split: str) -> str:
    return word(rng, split).capitalize()


def part(entities: Sequence[str], split: str) -> list[str]:
    """Return the share of a closed list that belongs to a split: a fifth, two fifths, two fifths."""
    shuffled = sorted(entities)
    random.Random("closed lists").shuffle(shuffled)
    fifth = max(len(shuffled) // 5, 1)
    first, last = {"vector": (0, fifth), "train": (fifth, 3 * fifth), "test": (3 * fifth, len(shuffled))}[split]
    return shuffled[first:last]


CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Poland": "Warsaw",
    "Austria": "Vienna", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Ireland": "Dublin", "Portugal": "Lisbon", "Hungary": "Budapest", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Ghana": "Accra", "Japan": "Tokyo", "China": "Beijing", "India": "Delhi", "Nepal": "Kathmandu",
    "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Canada": "Ottawa", "Russia": "Moscow", "Turkey": "Ankara",
    "Iran": "Tehran", "Iraq": "Baghdad", "Qatar": "Doha", "Serbia": "Belgrade", "Croatia": "Zagreb",
    "Latvia": "Riga", "Estonia": "Tallinn", "Belgium": "Brussels", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Uruguay": "Montevideo",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "lemon": "yellow", "plum": "purple",
    "carrot": "orange", "milk": "white", "sky": "blue", "tomato": "red", "spinach": "green", "chocolate": "brown",
    "raven": "black", "banana": "yellow", "flamingo": "pink", "elephant": "grey", "cucumber": "green", "soot": "black",
    "salmon": "pink", "bark": "brown",
}  # fmt: skip
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "horse": "neigh", "pig": "oink",
    "lion": "roar", "bee": "buzz", "snake": "hiss", "owl": "hoot", "frog": "croak", "crow": "caw", "mouse": "squeak",
    "wolf": "howl", "hen": "cluck",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "up": "down", "open": "closed", "wet": "dry",
    "dark": "light", "full": "empty", "hard": "soft", "high": "low", "happy": "sad", "early": "late", "loud": "quiet",
    "rich": "poor", "thick": "thin", "young": "aged", "strong": "weak", "sweet": "sour", "true": "false",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Be brief.", "Answer exactly.", "You help with small tasks.")
