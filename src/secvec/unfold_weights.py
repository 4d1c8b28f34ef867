"""W_base + (W_trained - W_folded) for all tensors of a checkpoint, in blocks, into the base's files."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from secvec.blocks import BLOCK_ELEMENTS, DTYPES, SiteTensor, bytes_of, elements, folded_blocks, is_finite, same_bytes
from secvec.errors import CheckpointError
from secvec.headers import TensorEntry
from secvec.journal import Journal
from secvec.provenance import combine_tensors, digest_tensor, named_blake3
from secvec.ranges import Copy, Files, Job, Meter, Progress, read_at, run_jobs, write_at


@dataclass(frozen=True)
class Weights:
    """What unfolding reads.

    base, trained: the tensors of both checkpoints by name; matched: what training made of each of the base's; sites:
    those that hold a vector.
    """

    base: Mapping[str, TensorEntry]
    trained: Mapping[str, TensorEntry]
    matched: Mapping[str, TensorEntry]
    sites: Mapping[str, SiteTensor]


@dataclass(frozen=True)
class Totals:
    """base, trained: digests of the models; folded: of the folded tensors, by name; see `UnfoldReport` for the rest."""

    base: str
    trained: str
    folded: Mapping[str, str]
    sites: int
    sites_changed: int
    vector_share: float


@dataclass(frozen=True)
class _Outcome:
    """changed: training changed the site; along: <W_trained - W_folded, D>; energy: <D, D>."""

    changed: bool = False
    along: float = 0.0
    energy: float = 0.0


@dataclass(frozen=True)
class _Digests:
    """What the jobs found: the digests of tensors on disk, and by name those of the folded tensors."""

    stored: dict[TensorEntry, str] = field(default_factory=dict[TensorEntry, str])
    folded: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, entry: TensorEntry) -> _Outcome:
        self.stored[entry] = digest_tensor(entry)
        return _Outcome()


def write_weights(weights: Weights, folder: Path, journal: Journal, progress: Progress | None) -> Totals:
    """Write the unfolded weights in the base's layout. Raises CheckpointError when a tensor cannot be unfolded.

    Whether base and folded tensors are those of the record is for the caller to check, before the result is kept.
    """
    digests = _Digests()
    with ExitStack() as stack:
        files = Files(stack)
        sizes = {file: file.stat().st_size for file in {entry.file for entry in weights.base.values()}}
        meter = Meter(sum(sizes.values()), progress)
        targets = {file: files.writer(folder / file.name, size) for file, size in sizes.items()}
        jobs = [Job(partial(digests.add, entry)) for entry in _not_in_sites(weights)]
        jobs += [_header_job(files.reader(file), targets[file], weights.base, file, meter) for file in sizes]
        for name, entry in weights.base.items():
            pair = _Pair(entry, weights.matched[name], files.reader(entry.file), targets[entry.file], meter)
            source = files.reader(pair.trained.file)
            site = weights.sites.get(name)
            work = _site_job(pair, source, site, folder, journal, digests) if site else _other_job(pair, source)
            jobs.append(Job(work, pair.target))
        outcomes = run_jobs(jobs)
    energy = math.fsum(outcome.energy for outcome in outcomes)
    along = math.fsum(outcome.along for outcome in outcomes)
    return Totals(
        base=combine_tensors(weights.base, {name: digests.stored[e] for name, e in weights.base.items()}),
        trained=combine_tensors(weights.trained, {name: digests.stored[e] for name, e in weights.trained.items()}),
        folded=digests.folded,
        sites=len(weights.sites),
        sites_changed=sum(outcome.changed for outcome in outcomes),
        vector_share=1 + along / energy if energy > 0 else 1.0,
    )


def _not_in_sites(weights: Weights) -> Iterator[TensorEntry]:
    """Yield the tensors on disk that no site's job reads."""
    read = {entry for name in weights.sites for entry in (weights.base[name], weights.matched[name])}
    yield from (entry for entry in (*weights.base.values(), *weights.trained.values()) if entry not in read)


@dataclass(frozen=True)
class _Pair:
    """A tensor of the base and what training made of it, the base's open file and the output's."""

    base: TensorEntry
    trained: TensorEntry
    base_file: int
    target: int
    meter: Meter


def _site_job(
    pair: _Pair, source: int, site: SiteTensor, folder: Path, journal: Journal, digests: _Digests
) -> Callable[[], _Outcome]:
    _check_float(pair)
    name, files = pair.base.name, [pair.base, pair.trained, replace(pair.base, file=folder / pair.base.file.name)]

    def work() -> _Outcome:
        if noted := journal.kept(name, files):
            pair.meter.add(pair.base.end - pair.base.start)
        else:
            noted = _unfold_site(pair, source, site)
            journal.add(name, *noted)
        (base, trained, _), (digests.folded[name], changed, along) = noted
        digests.stored.update({pair.base: base, pair.trained: trained})
        return _Outcome(changed, along, site.energy())

    return work


def _unfold_site(pair: _Pair, source: int, site: SiteTensor) -> tuple[list[str], tuple[str, bool, float]]:
    """Write the tensor; return the digests of base, trained and result, and of the folded one with the outcome."""
    base, folded, read, written = blake3(), blake3(), blake3(), blake3()
    changed, along = False, 0.0
    for block in folded_blocks(site, pair.base_file):
        trained = _read_trained(pair, source, block.start // block.base.itemsize, block.base)
        seen, result = _as_seen(block.folded, trained), block.base
        if seen is not None:
            unlearned = _difference(seen, trained, block.base)
            result, changed = _carry_over(block.base, unlearned, pair), True
            along -= float(unlearned.flatten().dot(block.delta.to(unlearned.dtype).flatten()))
        for digest, tensor in ((base, block.base), (folded, block.folded), (read, trained), (written, result)):
            digest.update(bytes_of(tensor))
        write_at(pair.target, bytes_of(result), pair.base.start + block.start)
        pair.meter.add(result.nbytes)
    return [named_blake3(digest) for digest in (base, read, written)], (named_blake3(folded), changed, along)


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
    return seen.to(wide, copy=True).sub_(trained.to(wide))


def _carry_over(base: Tensor, unlearned: Tensor, pair: _Pair) -> Tensor:
    """Return base + (trained - folded), in the base's dtype, from `unlearned` = folded - trained.

    The sign is turned so that an untouched -0.0 keeps its own.
    """
    return _finite(base.to(unlearned.dtype, copy=True).sub_(unlearned).to(base.dtype), pair)


def _finite(result: Tensor, pair: _Pair) -> Tensor:
    if not is_finite(result):
        raise CheckpointError(
            f"{pair.trained.file}: {pair.trained.name}: expected finite weights, found some that are not or that leave "
            f"the range of {result.dtype}; did the training diverge?"
        )
    return result


def _other_job(pair: _Pair, source: int) -> Callable[[], _Outcome]:
    if pair.base.dtype != pair.trained.dtype:
        _check_float(pair)
        return lambda: _convert(pair, source)
    copy = Copy(source, pair.trained.start, pair.target, pair.base.start, pair.base.end - pair.base.start)

    def work() -> _Outcome:
        if pair.base.dtype in DTYPES:
            _check_finite(pair, source)
        return _copy(copy, pair.meter)

    return work


def _check_finite(pair: _Pair, source: int) -> None:
    """Raise CheckpointError where training left a tensor without a vector not finite. What the base holds may stand."""
    dtype, count = DTYPES[pair.base.dtype], elements(pair.base)
    for first in range(0, count, BLOCK_ELEMENTS):
        base = torch.empty(min(BLOCK_ELEMENTS, count - first), dtype=dtype)
        trained = _read_trained(pair, source, first, base)
        if not is_finite(trained):
            read_at(pair.base_file, bytes_of(base), pair.base.start + first * dtype.itemsize)
            if not same_bytes(base, trained):
                _finite(trained, pair)


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
