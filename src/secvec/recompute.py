"""W + D and W_base + U once more, tensor by tensor, in plain torch: what the proof holds the folders' files against.

Nothing here is shared with `fold` and `unfold` but the names of tensors: an error there must not hide here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from secvec.blocks import SiteTensor, site_tensors
from secvec.companions import model_config
from secvec.headers import TensorEntry, read_index
from secvec.matching import match_tensors
from secvec.vector import SecurityVector

# Fold's fixed-point factors keep 24 bits of the largest value in a row.
_PRODUCT_TOLERANCE = 2.0**-21


def misfolded(base: Path, folded: Path, vectors: Sequence[SecurityVector]) -> list[str]:
    """Return the tensors of a folded folder that are not the base's, plus D at the sites of vectors.

    Sites are compared with float64 mathematics, to a rounding step of their dtype; all other tensors to the bit.
    """
    originals, found = read_index(base), read_index(folded)
    sites = site_tensors(originals, vectors, model_config(base))
    wrong = list(originals.keys() ^ found.keys())
    for name in originals.keys() & found.keys():
        original, here = read_tensor(originals[name]), read_tensor(found[name])
        fits = _holds(here, original, sites[name]) if name in sites else same(here, original)
        if not fits:
            wrong.append(name)
    return sorted(wrong)


def updated(base: Path, folded: Path, trained: Path, vectors: Sequence[SecurityVector]) -> Iterator[tuple[str, Tensor]]:
    """Yield W_base + U by the base's names, in its dtypes: U = W_trained - W_folded at the sites.

    W_folded is first rounded to the dtype that the trainer saved, which is not part of what it learned. Other tensors
    are the trained ones, unless the trainer saved fewer bits than the base has: then they too take over the difference.
    """
    originals, starts = read_index(base), read_index(folded)
    ends = match_tensors(originals, read_index(trained), trained)
    sites = site_tensors(originals, vectors, model_config(base))
    for name, entry in originals.items():
        original, end = read_tensor(entry), read_tensor(ends[name])
        keeps_all = end.dtype == original.dtype or end.itemsize > original.itemsize
        if name not in sites and keeps_all:
            yield name, end.to(original.dtype)
            continue
        wide = torch.float64 if torch.float64 in (original.dtype, end.dtype) else torch.float32
        start = read_tensor(starts[name]).to(end.dtype)
        yield name, (original.to(wide) + (end.to(wide) - start.to(wide))).to(original.dtype)


def read_tensor(entry: TensorEntry) -> Tensor:
    with safe_open(entry.file, framework="pt") as opened:
        return opened.get_tensor(entry.name)


def same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are equal; NaN equals nothing."""
    return left.dtype == right.dtype and torch.equal(left, right)


def _holds(folded: Tensor, base: Tensor, site: SiteTensor) -> bool:
    """Tell whether `folded` is base + D, rounded to its dtype."""
    changes = [scale * (factors.b.double() @ factors.a.double()) for scale, factors in site.parts]
    sizes = [abs(scale) * f.rank * float(f.b.abs().max()) * float(f.a.abs().max()) for scale, f in site.parts]
    change = torch.stack(changes).sum(0)
    expected = base.double() + (change.T if site.transposed else change)
    limits = torch.finfo(base.dtype)
    rounding = 0.5 * limits.eps * expected.abs().clamp_min(limits.smallest_normal)
    apart = (folded.double() - expected).abs()
    return folded.dtype == base.dtype and bool((apart <= rounding + _PRODUCT_TOLERANCE * sum(sizes)).all())
