"""W + D for one tensor of a checkpoint, in blocks that fit the processor's cache."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secvec.companions import TRANSPOSED_MODELS
from secvec.errors import CheckpointError, SiteError
from secvec.exact import Array, ExactProduct, exact_product
from secvec.headers import TensorEntry
from secvec.ranges import read_at
from secvec.sites import check_site
from secvec.vector import Factors, SecurityVector

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# float64 scratch of 1 MiB: the second-level cache of a core. Any size gives the same bits.
BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class SiteTensor:
    """A site's tensor in the base checkpoint, and what the vectors add to it: sum of scale * B @ A."""

    entry: TensorEntry
    transposed: bool
    parts: tuple[tuple[float, Factors], ...]

    def product(self) -> ExactProduct:
        """Return the change as stored, (d_out, d_in) or its transpose; several vectors side by side are one product."""
        b, a = self._factors()
        exact_parts = 1 if self.entry.dtype in ("BF16", "F16") else 2
        return exact_product(a.T, b.T, parts=exact_parts) if self.transposed else exact_product(b, a, parts=exact_parts)

    def energy(self) -> float:
        """Return the squared Frobenius norm of the change, sum over (B^T B) * (A A^T)."""
        b, a = self._factors()
        return float(((b.T @ b) * (a @ a.T)).sum())

    def _factors(self) -> tuple[Array, Array]:
        """Return B (d_out, ranks), with the scales, and A (ranks, d_in) of all vectors, side by side, in float64."""
        b = np.concatenate([scale * _array(factors.b) for scale, factors in self.parts], axis=1)
        return b, np.concatenate([_array(factors.a) for _, factors in self.parts], axis=0)


@dataclass(frozen=True)
class Block:
    """Some rows of a site's tensor; its buffers hold until the next block is asked for.

    start: byte offset in the tensor; base, folded: the rows before and after, in the base's dtype; delta: float64.
    """

    start: int
    base: Tensor
    delta: Tensor
    folded: Tensor


def site_tensors(
    index: Mapping[str, TensorEntry], vectors: Sequence[SecurityVector], config: Mapping[str, Any]
) -> dict[str, SiteTensor]:
    """Find the tensors of all sites of all vectors, by name on disk.

    Raises SiteError when one is missing, outside the numbered blocks, or of another shape.
    """
    transposed = config.get("model_type") in TRANSPOSED_MODELS
    sites = {site: None for vector in vectors for site in vector.sites}
    return {(name := tensor_name(site, index)): _site_tensor(site, index[name], vectors, transposed) for site in sites}


def tensor_name(site: str, index: Mapping[str, TensorEntry]) -> str:
    """Return the name of a site's weight on disk.

    Checkpoints of a bare backbone lack the first part of the name. Those of multimodal models keep the names of
    transformers 4 (`language_model.model.`), whatever the model is called in memory (`model.language_model.`).
    """
    check_site(site)
    older = re.sub(r"^model\.language_model\.", "language_model.model.", site)
    for name in (f"{site}.weight", f"{site.partition('.')[2]}.weight", f"{older}.weight"):
        if name in index:
            return name
    raise SiteError(
        f"site {site}: expected a tensor {site}.weight in the checkpoint, found none; fit a vector on this model"
    )


def _site_tensor(site: str, entry: TensorEntry, vectors: Sequence[SecurityVector], transposed: bool) -> SiteTensor:
    parts = tuple((vector.scale, vector.factors[site]) for vector in vectors if site in vector.factors)
    shape = tuple(reversed(entry.shape)) if transposed else tuple(entry.shape)
    for _, factors in parts:
        if factors.shape != shape:
            raise SiteError(f"site {site}: the vector expects a weight of {factors.shape}, the checkpoint's is {shape}")
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{entry.file}: {entry.name}: expected one of {', '.join(DTYPES)}, found {entry.dtype}; "
            "a quantised weight cannot hold a vector: fold the unquantised model"
        )
    return SiteTensor(entry, transposed, parts)


def folded_blocks(site: SiteTensor, descriptor: int) -> Iterator[Block]:
    """Yield W and W' = round(W + D) block by block; the sum is in float64 and rounded once.

    descriptor: the open file of `site.entry`. Raises CheckpointError when a sum leaves the dtype's range.
    """
    rows, columns = site.entry.shape
    dtype = DTYPES[site.entry.dtype]
    step = min(rows, max(1, BLOCK_ELEMENTS // columns))
    product = site.product()
    base, folded = torch.empty(step, columns, dtype=dtype), torch.empty(step, columns, dtype=dtype)
    delta, total = torch.empty(step, columns, dtype=torch.float64), torch.empty(step, columns, dtype=torch.float64)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        block = Block(row * columns * dtype.itemsize, base[:count], delta[:count], folded[:count])
        read_at(descriptor, bytes_of(block.base), site.entry.start + block.start)
        product.rows(row, row + count, block.delta, total[:count])
        block.folded.copy_(total[:count].copy_(block.base).add_(block.delta))
        _check_range(site.entry, block.folded)
        yield block


def _check_range(entry: TensorEntry, folded: Tensor) -> None:
    # Only fp16 is so narrow that a weight could leave its range.
    if entry.dtype == "F16" and not is_finite(folded):
        raise CheckpointError(
            f"{entry.file}: {entry.name}: a weight plus the vector exceeds the range of fp16; use a bf16 or fp32 model"
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.view(_INTEGER[left.itemsize]), right.view(_INTEGER[left.itemsize])
    )


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite; both extremes are NaN where any value is. (isfinite takes 20 x as long.)"""
    return tensor.numel() == 0 or all(math.isfinite(float(extreme)) for extreme in tensor.aminmax())


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _array(factor: Tensor) -> Array:
    return factor.detach().cpu().double().numpy()


def elements(entry: TensorEntry) -> int:
    return math.prod(entry.shape)
