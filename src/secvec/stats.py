"""Intervals and paired tests; how well a score tells two groups apart, and where to cut it."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_Z95 = 1.959963984540054
_DRAWS, _CHUNK = 10_000, 100


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a rate (Wilson 1927); (0, 1) where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, _Z95 * _Z95
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # At the ends the formula gives 0 and 1, but for rounding.
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == n else middle + half


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean (Efron 1979), from 10,000 draws of a fixed seed."""
    drawn = _draws(values, lambda rng, n: rng.multinomial(n, np.full(n, 1 / n), size=_CHUNK) / n)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value that two rates over the same questions differ by chance (McNemar 1947).

    only_first, only_second: the questions that one of the two has and the other lacks.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    ways = total = 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean of paired differences, by flipping signs at random (Fisher 1935).

    10,000 draws of a fixed seed; the smallest p-value is 1/10,001.
    """
    drawn = _draws(differences, lambda rng, n: rng.choice((-1.0, 1.0), size=(_CHUNK, n)) / n)
    seen = abs(float(np.mean(differences)))
    return (1 + int((np.abs(drawn) >= seen - 1e-12).sum())) / (_DRAWS + 1)


def _draws(values: Sequence[float], weigh: Callable[[np.random.Generator, int], Any]) -> Any:
    """Return 10,000 weighted sums of the values, a few at a time: (10,000,)."""
    rng, data = np.random.default_rng(0), np.asarray(values, dtype=np.float64)
    return np.concatenate([weigh(rng, len(data)) @ data for _ in range(_DRAWS // _CHUNK)])


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Both must hold at least one score.
    """
    below = sorted(negatives)
    wins = sum(bisect_left(below, score) + bisect_right(below, score) for score in positives)
    return wins / (2 * len(positives) * len(negatives))


def best_cut(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Return the cut with the largest share of positives above it minus share of negatives above it (Youden 1950).

    It lies midway between two neighbouring scores; among equally good ones, in the widest gap. Both must hold at least
    one score; where all scores are equal that score is returned.
    """
    above, below = sorted(positives), sorted(negatives)
    scores = sorted({*above, *below})

    def worth(cut: float) -> float:
        return bisect_right(below, cut) / len(below) - bisect_right(above, cut) / len(above)

    pairs = pairwise(scores)
    ranked = [(round(worth(low), 12), high - low, (low + high) / 2) for low, high in pairs]
    return max(ranked)[2] if ranked else scores[0]
