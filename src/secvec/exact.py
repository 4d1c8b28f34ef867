"""A matrix product that has the same bits on every machine, whatever order its BLAS adds in.

A sum of floating-point products depends on the order of the additions and on fused multiply-adds, and both differ
between processors, BLAS libraries and numbers of threads. Sums of *integers* do not, as long as no partial sum is
rounded. So the factors are put on fixed-point grids (one step per row of the left one, one per column of the right one,
each a power of two) so coarse that every partial sum fits the 53 bits of a float64: then every order gives the exact
sum. (The idea is that of error-free splitting: Ozaki, Ogita, Oishi and Rump, Numer. Algorithms 59, 2012.)

One part keeps about 24 bits of the largest value in each row and column: as much as the float32 factors hold, and far
more than bf16 or fp16 weights do. Two parts keep about 46 bits, for float32 and float64 weights.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EXACT_BITS = 53
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ExactProduct:
    """The product left @ right as exact products, added in this order.

    Each term: left (rows, inner), right (inner, columns), float64, on grids whose partial sums are exact.
    """

    terms: tuple[tuple[Tensor, Tensor], ...]

    def rows(self, start: int, stop: int, out: Tensor, scratch: Tensor) -> None:
        """Write the rows start..stop of the product into `out`; both buffers are float64 (stop - start, columns)."""
        left, right = self.terms[0]
        torch.mm(left[start:stop], right, out=out)
        for left, right in self.terms[1:]:
            torch.mm(left[start:stop], right, out=scratch)
            out.add_(scratch)


def exact_product(left: Array, right: Array, *, parts: Literal[1, 2]) -> ExactProduct:
    """Prepare left (rows, rank) @ right (rank, columns)."""
    left, right = _balance(left, right)
    bits = _bits(left.shape[1])
    left_grid, right_grid = _on_grid(left, 1, bits), _on_grid(right, 0, bits)
    terms = [(left_grid, right_grid)]
    if parts == 2:
        terms.append((left_grid, _on_grid(right - right_grid, 0, bits)))
        terms.append((_on_grid(left - left_grid, 1, bits), right_grid))
    return ExactProduct(tuple((torch.from_numpy(a), torch.from_numpy(b)) for a, b in terms))


def _bits(rank: int) -> int:
    """Return the bits per factor: rank products of two such integers sum to at most 2**53."""
    return (_EXACT_BITS - math.ceil(math.log2(rank))) // 2


def _balance(left: Array, right: Array) -> tuple[Array, Array]:
    """Shift powers of two between the factors, exactly, so that each rank component is about as large in both.

    Otherwise components of several vectors, or of one unevenly trained vector, would share a grid that suits few.
    """
    shift = (_exponent(left, 0)[0] - _exponent(right, 1)[:, 0]) // 2
    return np.ldexp(left, -shift), np.ldexp(right, shift[:, None])


def _exponent(values: Array, axis: int) -> NDArray[np.int32]:
    """Return the smallest e with |values| < 2**e along an axis, which is kept."""
    return np.frexp(np.abs(values).max(axis, keepdims=True))[1]


def _on_grid(values: Array, axis: int, bits: int) -> Array:
    """Round to multiples of 2**(e - bits), e being the exponent of the largest value along the axis."""
    step = _exponent(values, axis) - bits
    return np.ldexp(np.rint(np.ldexp(values, -step)), step)
