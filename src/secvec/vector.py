"""`SecurityVector`: the low-rank change of a model's linear sites, as a value without I/O."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secvec.errors import ArtifactError


@dataclass(frozen=True)
class Factors:
    """The two factors of one site; the site's weight changes by `scale * b @ a`.

    a: (rank, d_in), b: (d_out, rank), both float32.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the site's weight."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class VectorInfo:
    """Where a vector comes from: everything it records besides its factors.

    base, tokenizer, chat_template and data are digests ("blake3:..." of weights, else "sha256:..."); the unwanted rows
    themselves are never stored.
    """

    kind: str
    base: str
    tokenizer: str
    chat_template: str
    data: str
    fit: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    versions: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class SecurityVector:
    """A security vector D (arXiv 2311.02105): `{site: (A, B)}` and a scale.

    The effective change of a site's (d_out, d_in) weight is `scale * B @ A`. Sites carry canonical names
    (`secvec.sites`). Raises ArtifactError on empty, misshapen or non-finite factors.
    """

    factors: Mapping[str, Factors]
    scale: float
    info: VectorInfo

    def __post_init__(self) -> None:
        if not self.factors:
            raise ArtifactError("a security vector needs at least one site, found none")
        if not math.isfinite(self.scale):
            raise ArtifactError(f"the scale of a security vector must be finite, found {self.scale!r}")
        for site, factors in self.factors.items():
            _check_factors(site, factors)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.factors)

    def delta(self, site: str) -> Tensor:
        """Return the change of one site's weight, `scale * B @ A`, in float64: (d_out, d_in)."""
        factors = self.factors[site]
        return self.scale * (factors.b.double() @ factors.a.double())

    def norm(self) -> float:
        """Return the Frobenius norm of the whole change, sqrt(sum over sites ||scale * B @ A||^2)."""
        return math.sqrt(sum(float(self.delta(site).square().sum()) for site in self.sites))


def _check_factors(site: str, factors: Factors) -> None:
    for name, tensor in (("A", factors.a), ("B", factors.b)):
        if tensor.ndim != 2 or tensor.dtype != torch.float32:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ArtifactError(f"site {site}: factor {name} must be a float32 matrix, found {found}")
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"site {site}: factor {name} holds values that are not finite")
    if factors.a.shape[0] != factors.b.shape[1] or factors.rank == 0:
        shapes = f"A {tuple(factors.a.shape)}, B {tuple(factors.b.shape)}"
        raise ArtifactError(f"site {site}: A (rank, d_in) and B (d_out, rank) must share a rank >= 1, found {shapes}")
