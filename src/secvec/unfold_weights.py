"""W_base + (W_trained - W_folded) for all tensors of a checkpoint, in blocks, into the base's files."""

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secvec.blocks import BLOCK_ELEMENTS, DTYPES, SiteTensor, bytes_of, elements, folded_blocks, same_bytes
from secvec.errors import CheckpointError
from secvec.headers import TensorEntry
from secvec.provenance import digest_model
from secvec.ranges import Copy, Files, Job, Meter, Progress, read_at, run_jobs, write_at


@dataclass(frozen=True)
class Weights:
    """What unfolding reads.

    base: the base's tensors by name; trained: what training made of each; sites: those that hold a vector;
    digests: of the folded tensors, from the fold record.
    """

    base: Mapping[str, TensorEntry]
    trained: Mapping[str, TensorEntry]
    sites: Mapping[str, SiteTensor]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Totals:
    """trained: digest of the trained model; vector_share: see `UnfoldReport`."""

    trained: str
    sites: int
    sites_changed: int
    vector_share: float


@dataclass(frozen=True)
class _Outcome:
    """changed: training changed the site; along: <W_trained - W_folded, D>; energy: <D, D>."""

    changed: bool = False
    along: float = 0.0
    energy: float = 0.0


def write_weights(
    weights: Weights, folder: Path, check_base: Callable[[], str], trained: Path, progress: Progress | None
) -> Totals:
    """Write the unfolded weights in the base's layout. Raises CheckpointError when anything does not match."""
    with ExitStack() as stack:
        files = Files(stack)
        sizes = {file: file.stat().st_size for file in {entry.file for entry in weights.base.values()}}
        meter = Meter(sum(sizes.values()), progress)
        targets = {file: files.writer(folder / file.name, size) for file, size in sizes.items()}
        digests: dict[str, str] = {}
        jobs = [
            Job(_digest_job(check_base, "base", digests)),
            Job(_digest_job(lambda: digest_model(trained), "trained", digests)),
            *(_header_job(files.reader(file), targets[file], weights.base, file, meter) for file in sizes),
        ]
        for name, entry in weights.base.items():
            pair = _Pair(entry, weights.trained[name], files.reader(entry.file), targets[entry.file], meter)
            source = files.reader(weights.trained[name].file)
            job = _site_job(pair, source, weights, name) if name in weights.sites else _other_job(pair, source)
            jobs.append(Job(job, pair.target))
        outcomes = run_jobs(jobs)
    return _totals(outcomes, len(weights.sites), digests["trained"])


def _totals(outcomes: list[_Outcome], sites: int, trained: str) -> Totals:
    energy = math.fsum(outcome.energy for outcome in outcomes)
    along = math.fsum(outcome.along for outcome in outcomes)
    share = 1 + along / energy if energy > 0 else 1.0
    return Totals(trained, sites, sum(outcome.changed for outcome in outcomes), share)


def _digest_job(digest: Callable[[], str], name: str, digests: dict[str, str]) -> Callable[[], _Outcome]:
    def job() -> _Outcome:
        digests[name] = digest()
        return _Outcome()

    return job


@dataclass(frozen=True)
class _Pair:
    """A tensor of the base and what training made of it, the base's open file and the output's."""

    base: TensorEntry
    trained: TensorEntry
    base_file: int
    target: int
    meter: Meter


def _site_job(pair: _Pair, source: int, weights: Weights, name: str) -> Callable[[], _Outcome]:
    _check_float(pair)
    return lambda: _unfold_site(pair, source, weights.sites[name], weights.digests[name])


def _unfold_site(pair: _Pair, source: int, site: SiteTensor, expected: str) -> _Outcome:
    digest = hashlib.sha256()
    changed, along = False, 0.0
    for block in folded_blocks(site, pair.base_file):
        digest.update(bytes_of(block.folded))
        trained = _read_trained(pair, source, block.start // block.base.itemsize, block.base)
        seen, result = _as_seen(block.folded, trained), block.base
        if seen is not None:
            unlearned = _difference(seen, trained, block.base)
            result, changed = _carry_over(block.base, unlearned, pair), True
            along -= float(unlearned.flatten().dot(block.delta.to(unlearned.dtype).flatten()))
        write_at(pair.target, bytes_of(result), pair.base.start + block.start)
        pair.meter.add(result.nbytes)
    if (found := "sha256:" + digest.hexdigest()) != expected:
        raise CheckpointError(
            f"{pair.base.file}: {pair.base.name}: expected the folded tensor {expected!r} of the record, folding "
            f"again gave {found!r}; base, vector or record were altered: fold and train again"
        )
    return _Outcome(changed, along, site.energy())


def _read_trained(pair: _Pair, source: int, first: int, like: Tensor) -> Tensor:
    """Read the elements of the trained tensor from `first` on that lie where `like` does."""
    trained = torch.empty_like(like, dtype=DTYPES[pair.trained.dtype])
    read_at(source, bytes_of(trained), pair.trained.start + first * trained.itemsize)
    return trained


def _as_seen(folded: Tensor, trained: Tensor) -> Tensor | None:
    """Return the folded weights as the trainer saw them, in the dtype it saved, or None when training left them so.

    A fp32 model trained in bf16 would otherwise take the rounding of every weight for learning.
    """
    seen = folded.to(trained.dtype)
    return None if same_bytes(seen, trained) else seen


def _difference(seen: Tensor, trained: Tensor, base: Tensor) -> Tensor:
    """Return W_folded - W_trained in float32, or in float64 if one of the checkpoints is."""
    wide = torch.float64 if torch.float64 in (base.dtype, trained.dtype) else torch.float32
    return seen.to(wide) - trained.to(wide)


def _carry_over(base: Tensor, unlearned: Tensor, pair: _Pair) -> Tensor:
    """Return base + (trained - folded), in the base's dtype, from `unlearned` = folded - trained.

    The sign is turned so that an untouched -0.0 keeps its own.
    """
    return _finite((base.to(unlearned.dtype) - unlearned).to(base.dtype), pair)


def _finite(result: Tensor, pair: _Pair) -> Tensor:
    if not bool(torch.isfinite(result).all()):
        raise CheckpointError(
            f"{pair.trained.file}: {pair.trained.name}: expected finite weights, found some that are not or that leave "
            f"the range of {result.dtype}; did the training diverge?"
        )
    return result


def _other_job(pair: _Pair, source: int) -> Callable[[], _Outcome]:
    if pair.base.dtype != pair.trained.dtype:
        _check_float(pair)
        return lambda: _convert(pair, source)
    count_bytes = pair.base.end - pair.base.start
    return partial(_copy, Copy(source, pair.trained.start, pair.target, pair.base.start, count_bytes), pair.meter)


def _copy(copy: Copy, meter: Meter) -> _Outcome:
    copy.run(meter)
    return _Outcome()


def _convert(pair: _Pair, source: int) -> _Outcome:
    """Write a tensor without a vector that training saved in another dtype."""
    dtype = DTYPES[pair.base.dtype]
    for first in range(0, elements(pair.base), BLOCK_ELEMENTS):
        base = torch.empty(min(BLOCK_ELEMENTS, elements(pair.base) - first), dtype=dtype)
        read_at(pair.base_file, bytes_of(base), pair.base.start + first * dtype.itemsize)
        trained = _read_trained(pair, source, first, base)
        result = _converted(base, trained, pair)
        write_at(pair.target, bytes_of(result), pair.base.start + first * dtype.itemsize)
        pair.meter.add(result.nbytes)
    return _Outcome()


def _converted(base: Tensor, trained: Tensor, pair: _Pair) -> Tensor:
    if trained.itemsize > base.itemsize:
        return _finite(trained.to(base.dtype), pair)
    seen = _as_seen(base, trained)
    return base if seen is None else _carry_over(base, _difference(seen, trained, base), pair)


def _check_float(pair: _Pair) -> None:
    for entry in (pair.base, pair.trained):
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.file}: {entry.name}: expected one of {', '.join(DTYPES)}, found {entry.dtype}; "
                "save the trained model unquantised"
            )


def _header_job(source: int, target: int, base: Mapping[str, TensorEntry], file: Path, meter: Meter) -> Job[_Outcome]:
    count_bytes = min(entry.start for entry in base.values() if entry.file == file)
    return Job(partial(_copy, Copy(source, 0, target, 0, count_bytes), meter), target)
