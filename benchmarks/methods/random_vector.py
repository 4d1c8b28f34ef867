"""Control: a random vector of the same size."""

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.methods.fitted import fitted
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting
from secvec.vector import Factors, SecurityVector


def random_vector(setting: Setting) -> Path:
    """Train with a Gaussian vector whose rank and norm at each site are those of the fitted, uncalibrated one.

    If this protected, size would be what counts, not direction.
    """
    return folded(setting, [scrambled(vector, setting.config.seed) for vector in fitted(setting, setting.fit)])


def scrambled(vector: SecurityVector, seed: int) -> SecurityVector:
    """Return a vector with random factors and, at each site, the same Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    for site, pair in vector.factors.items():
        a, b = (torch.randn(tensor.shape, generator=generator) for tensor in (pair.a, pair.b))
        ratio = (pair.b @ pair.a).norm() / (b @ a).norm()
        factors[site] = Factors(a, b * ratio)
    return replace(vector, factors=factors)
