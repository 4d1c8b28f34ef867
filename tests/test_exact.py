from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch

from secvec.exact import exact_product

PARTS: list[Literal[1, 2]] = [1, 2]


def factors(rank: int, *, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Factors whose magnitudes differ by many powers of ten, between components, rows and columns."""
    generator = np.random.default_rng(rank)
    uneven = 10.0 ** generator.uniform(-spread, spread, rank)
    left = generator.standard_normal((40, rank)).astype(np.float32) * uneven
    right = generator.standard_normal((rank, 60)).astype(np.float32) / uneven[:, None]
    return left * np.float64(0.37), right.astype(np.float64)


def product(left: np.ndarray, right: np.ndarray, parts: Literal[1, 2]) -> torch.Tensor:
    out, scratch = (torch.empty(left.shape[0], right.shape[1], dtype=torch.float64) for _ in range(2))
    exact_product(left, right, parts=parts).rows(0, left.shape[0], out, scratch)
    return out


@pytest.mark.parametrize("rank", [1, 3, 16, 64, 300])
def test_each_term_is_the_exact_sum_so_the_order_of_additions_cannot_matter(rank: int) -> None:
    for left, right in exact_product(*factors(rank), parts=2).terms:
        found = left @ right
        backwards = torch.zeros_like(found)
        for k in reversed(range(rank)):
            backwards += left[:, k : k + 1] * right[k : k + 1]
        assert torch.equal(found, backwards)
        exact = [
            sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(left[7], right[:, j], strict=True))
            for j in range(5)
        ]
        assert [Fraction(float(x)) for x in found[7, :5]] == exact


@pytest.mark.parametrize("parts", PARTS)
def test_the_product_is_as_precise_as_it_says(parts: Literal[1, 2]) -> None:
    left, right = factors(16)
    error = (product(left, right, parts) - torch.from_numpy(left @ right)).abs()
    size = torch.from_numpy(np.abs(left) @ np.abs(right))
    assert float((error / size).max()) < {1: 2.0**-21, 2: 2.0**-43}[parts]


@pytest.mark.parametrize("parts", PARTS)
def test_blocks_and_threads_give_the_same_bits(parts: Literal[1, 2]) -> None:
    left, right = factors(16)
    whole, prepared = product(left, right, parts), exact_product(left, right, parts=parts)
    pieces, scratch = torch.empty_like(whole), torch.empty_like(whole)
    for start in range(0, 40, 7):
        stop = min(40, start + 7)
        prepared.rows(start, stop, pieces[start:stop], scratch[start:stop])
    assert torch.equal(pieces, whole)


def test_a_zero_component_is_no_trouble() -> None:
    left, right = factors(3)
    left[:, 1] = 0
    right[2] = 0
    left[5] = 0
    assert bool(torch.isfinite(product(left, right, 2)).all())
    assert float(product(left, right, 1)[5].abs().max()) == 0
