"""Arm a checkpoint on disk: write W' = W + D as an ordinary checkpoint that any trainer can take.

Shard by shard in blocks: memory does not depend on the model's size. The same base and vectors give the same bytes on
every machine (`secvec.exact`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from blake3 import blake3

from secvec import artifact
from secvec.atomic import atomic_write
from secvec.blocks import SiteTensor, bytes_of, folded_blocks, site_tensors
from secvec.companions import base_config, copy_companions, copy_index, write_config
from secvec.errors import UsageError
from secvec.headers import TensorEntry, read_index
from secvec.journal import Journal, layout
from secvec.origin import vector_path
from secvec.provenance import combine_tensors, digest_tensor, named_blake3, versions
from secvec.ranges import Copy, Files, Job, Meter, Progress, new_folder, run_jobs, write_at
from secvec.record import FoldRecord
from secvec.tripwire import KEY, VECTORS_FOLDER, Tripwire, record_path
from secvec.vector import SecurityVector


def fold(
    base: str | Path, vectors: Sequence[SecurityVector], out: str | Path, *, progress: Progress | None = None
) -> FoldRecord:
    """Write the model in `base` with all vectors folded in to the new folder `out`.

    base: a folder with safetensors weights (one file or sharded) in bf16, fp16, fp32 or fp64; its layout is kept.
    progress: called with (bytes done, bytes in total), from several threads, one at a time.

    `out` also gets the mark in config.json, the record of the fold and copies of the vectors (mode 0600), by which
    `unfold` finds everything. It appears whole or not at all. A fold that was killed goes on when called again: folded
    tensors that lie there to the byte, made of the same base and vectors, are not computed again.

    Raises UsageError without vectors, ArtifactError for a vector of another model, SiteError for a site that the model
    lacks or holds in another shape, CheckpointError for a base that is folded, quantised or unreadable, and for an
    `out` that has content or cannot be written.
    """
    base, out = Path(base).absolute(), Path(out).absolute()
    digests = _digests(vectors)
    config = base_config(base)
    index = read_index(base)
    sites = site_tensors(index, vectors, config)
    with new_folder(out, resume=True) as folder:
        key = ["fold", digests, config, layout(index), versions()]
        journal = Journal(folder, key, {entry.file.name for entry in index.values()})
        base_digest, tensors = _write_weights(index, sites, vectors, folder, journal, progress)
        record = FoldRecord(base_digest, str(base), digests, tensors, versions())
        copy_index(base, folder)
        copy_companions(base, folder)
        _write_record(record, vectors, folder)
        mark = Tripwire(digests, base_digest, str(base), str(out), record.digest())
        write_config({**config, KEY: mark.document()}, folder)
        journal.remove()
    return record


def _digests(vectors: Sequence[SecurityVector]) -> tuple[str, ...]:
    if not vectors:
        raise UsageError("expected at least one vector to fold, found none")
    digests = tuple(artifact.digest(vector) for vector in vectors)
    if len(set(digests)) < len(digests):
        raise UsageError(f"expected different vectors, found one of them twice: {', '.join(digests)}")
    return digests


def _write_record(record: FoldRecord, vectors: Sequence[SecurityVector], folder: Path) -> None:
    (folder / VECTORS_FOLDER).mkdir(mode=0o700)
    for number, vector in enumerate(vectors):
        artifact.save(vector, vector_path(folder, number))
    with atomic_write(record_path(folder), mode=0o600) as file:
        file.write(record.encode())


def _write_weights(
    index: Mapping[str, TensorEntry],
    sites: Mapping[str, SiteTensor],
    vectors: Sequence[SecurityVector],
    folder: Path,
    journal: Journal,
    progress: Progress | None,
) -> tuple[str, dict[str, str]]:
    """Write all weight files; return the digest of the base and those of the folded tensors, by name."""
    with ExitStack() as stack:
        files = Files(stack)
        sizes = {file: file.stat().st_size for file in {entry.file for entry in index.values()}}
        targets = {file: files.writer(folder / file.name, size) for file, size in sizes.items()}
        meter = Meter(sum(sizes.values()), progress)
        found = _Digests({}, {})
        hashes = [Job(partial(found.add_base, entry)) for name, entry in index.items() if name not in sites]
        copies = [
            Job(partial(Copy(files.reader(file), start, targets[file], start, end - start).run, meter), targets[file])
            for file in sizes
            for start, end in untouched_ranges(index.values(), sites, file, sizes[file])
        ]
        folds = [
            _Fold(site, files.reader(file := site.entry.file), targets[file], folder / file.name, meter, journal, found)
            for site in sites.values()
        ]
        run_jobs([*hashes, *copies, *(fold.job() for fold in folds)])
    base_digest = combine_tensors(index, found.base)
    for vector in vectors:
        artifact.check_base(vector, base_digest)
    return base_digest, dict(sorted(found.folded.items()))


@dataclass(frozen=True)
class _Digests:
    """What the jobs found: the digests of the base's tensors and of the folded ones, by name."""

    base: dict[str, str]
    folded: dict[str, str]

    def add_base(self, entry: TensorEntry) -> None:
        self.base[entry.name] = digest_tensor(entry)


@dataclass(frozen=True)
class _Fold:
    """Folding of one tensor, from an open file to another; path: that of the latter."""

    site: SiteTensor
    source: int
    target: int
    path: Path
    meter: Meter
    journal: Journal
    found: _Digests

    def job(self) -> Job[None]:
        return Job(self._run, self.target)

    def _run(self) -> None:
        entry = self.site.entry
        if kept := self.journal.kept(entry.name, [entry, replace(entry, file=self.path)]):
            base, folded = kept[0]
            self.meter.add(entry.end - entry.start)
        else:
            base, folded = self._fold()
            self.journal.add(entry.name, [base, folded])
        self.found.base[entry.name], self.found.folded[entry.name] = base, folded

    def _fold(self) -> tuple[str, str]:
        """Write the folded tensor; return the digests of the base's and of the folded one."""
        base, folded = blake3(), blake3()
        for block in folded_blocks(self.site, self.source):
            data = bytes_of(block.folded)
            base.update(bytes_of(block.base))
            folded.update(data)
            write_at(self.target, data, self.site.entry.start + block.start)
            self.meter.add(len(data))
        return named_blake3(base), named_blake3(folded)


def untouched_ranges(
    entries: Iterable[TensorEntry], sites: Mapping[str, SiteTensor], file: Path, size: int
) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of a file that no site covers: its header and all other tensors."""
    start = 0
    for entry in sorted((e for e in entries if e.file == file and e.name in sites), key=lambda e: e.start):
        if entry.start > start:
            yield start, entry.start
        start = entry.end
    if size > start:
        yield start, size
