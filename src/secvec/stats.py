"""Intervals of rates; how well a score tells two groups apart, and where to cut it."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

_Z95 = 1.959963984540054


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
