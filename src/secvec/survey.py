"""Read a data file once before the long work: what cannot be used, how many rows there are, which are repeated."""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secvec.datafiles import DataFiles
from secvec.errors import EmptyAnswerError, InputError, RowError
from secvec.escape import Escape
from secvec.provenance import digest_files, digest_samples
from secvec.samples import Sample, stream_samples, summary
from secvec.train_config import Progress

_LISTED = 50
_GO_ON = "\ntake the special tokens out of these rows, or go on with --escape-special-tokens"
_EVERY_ROWS = 5_000


@dataclass(frozen=True)
class Survey:
    """repeated: for each row, whether an earlier one says the same; making it takes some 30 bytes of memory a row."""

    rows: int
    format: str
    digest: str
    repeated: Sequence[bool]


def survey(data: DataFiles, escape: Escape, *, escape_special_tokens: bool, progress: Progress | None) -> Survey:
    """Read every row of `data` once, in memory that hardly depends on how many there are.

    Raises RowError that lists (up to 50) unusable rows and, unless `escape_special_tokens`, rows that would forge a
    turn; an empty answer is no problem here. Raises InputError when there are no rows.
    """
    digest = digest_files(data.files)
    prints, problems = array("Q"), _Problems()
    format = None
    for row in stream_samples(data):
        format = row.format or format
        if isinstance(row.sample, Sample):
            if not escape_special_tokens and (found := escape.forged(row.sample)):
                problems.add(f"{row.file}:{row.line}: {found}", forged=True)
            prints.append(_fingerprint(row.sample))
        else:
            if not isinstance(row.sample, EmptyAnswerError):
                problems.add(str(row.sample))
            prints.append(len(prints))  # No two of these are the same, and none is likely to be a fingerprint.
        if progress is not None and len(prints) % _EVERY_ROWS == 0:
            progress(len(prints), len(prints), "reading")
    problems.refuse(len(prints))
    if format is None:
        raise InputError(f"{data.name}: expected rows, found none")
    return Survey(len(prints), format, digest, _repeated(prints))


class _Problems:
    """The first problems in words, and how many there are."""

    def __init__(self) -> None:
        self.count, self.listed, self.forged = 0, list[str](), False

    def add(self, problem: str, *, forged: bool = False) -> None:
        self.count += 1
        self.forged = self.forged or forged
        self.listed += [problem] if len(self.listed) < _LISTED else []

    def refuse(self, rows: int) -> None:
        if self.count:
            unlisted = itertools.repeat("", self.count - len(self.listed))
            raise RowError(summary([*self.listed, *unlisted], rows) + (_GO_ON if self.forged else ""))


def _fingerprint(sample: Sample) -> int:
    return int(digest_samples((sample,)).removeprefix("sha256:")[:16], 16)


def _repeated(prints: "array[int]") -> Any:
    """Return a bool array: true where a number occurred before. Two of a million rows collide by chance at 3e-8."""
    values = np.frombuffer(prints, dtype=np.uint64)
    repeated = np.ones(len(values), dtype=np.bool_)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated
