"""What a scan reads: checked before anything is written, then row by row as tokens."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secvec import artifact
from secvec.companions import tokens_a_row
from secvec.compatible import check_vector
from secvec.datafiles import DataFiles, find
from secvec.errors import CheckpointError, RowError, UsageError
from secvec.escape import Escape
from secvec.models import load_tokenizer, resolve
from secvec.provenance import digest_model, digest_samples, versions
from secvec.samples import Row, Rows, Sample, Samples, line_suffix, read_rows, stream_samples
from secvec.scan_config import ScanConfig
from secvec.scan_rows import FLAGS, ScannedRow
from secvec.survey import Survey, survey
from secvec.tokens import Encoded, encode_each
from secvec.train_config import Progress
from secvec.tripwire import refuse_folded
from secvec.vector import SecurityVector

# Rows tokenised at a time: in full, before they are cut.
_CHUNK_ROWS = 64

Prepared = tuple[ScannedRow, Encoded | None]
"""What is known about a row before it is scored, and its tokens if it can be."""


@dataclass(frozen=True)
class ScanInputs:
    """All that a scan needs, checked before anything is written. limit: tokens of a row that are looked at."""

    folder: Path
    base: str
    tokenizer: PreTrainedTokenizerBase
    vectors: Mapping[str, SecurityVector]
    data: DataFiles
    survey: Survey
    unwanted: Sequence[Samples]
    anchors: Samples | None
    limit: int
    escape: Escape
    config: ScanConfig

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.base,
            "vectors": {name: artifact.digest(vector) for name, vector in self.vectors.items()},
            "data": self.survey.digest,
            "unwanted": [digest_samples(samples.rows) for samples in self.unwanted],
            "anchors": None if self.anchors is None else digest_samples(self.anchors.rows),
            "config": asdict(self.config),
            "versions": dict(versions()),
        }


def check_inputs(
    model: str | Path,
    data: str | Path,
    *,
    vectors: Sequence[SecurityVector | str | Path],
    unwanted: Sequence[Rows],
    anchors: Rows | None,
    config: ScanConfig,
    split: bool,
    progress: Progress | None,
) -> ScanInputs:
    """Check everything that `scan` is given, every row of the data included. Raises as `scan` does."""
    if not vectors:
        raise UsageError("expected at least one vector to scan with, found none (--vector)")
    if unwanted and len(unwanted) != len(vectors):
        raise UsageError(
            f"expected as many files of unwanted rows as vectors, found {len(unwanted)} and {len(vectors)}; "
            "give --unwanted once for each --vector, in the same order"
        )
    if config.threshold is not None and (unwanted or anchors is not None):
        raise UsageError("expected a threshold or rows to choose one on, found both; leave out --threshold")
    if anchors is not None and not unwanted:
        raise UsageError("anchors: expected unwanted rows to compare them with, found none; give --unwanted too")
    found = find(data)
    if split and line_suffix(found) is None:
        raise UsageError(
            f"{found.name}: only JSON lines and text can be split, where each row is a line; convert it first"
        )
    named = _named(vectors)
    folder = resolve(model).absolute()
    refuse_folded(folder, "scan with")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: expected a whole model, found an adapter; merge it into its base first")
    tokenizer, base = load_tokenizer(folder), digest_model(folder)
    for vector in named.values():
        check_vector(vector, folder, tokenizer, base_digest=base)
    escape = Escape.of(tokenizer)
    return ScanInputs(
        folder,
        base,
        tokenizer,
        named,
        found,
        survey(found, escape, escape_special_tokens=config.escape_special_tokens, progress=progress),
        [read_rows(rows, "unwanted") for rows in unwanted],
        None if anchors is None else read_rows(anchors, "anchors"),
        tokens_a_row(folder, config.max_length),
        escape,
        config,
    )


def _named(vectors: Sequence[SecurityVector | str | Path]) -> dict[str, SecurityVector]:
    """Load the vectors and name each by its file, with the folder where two files share a name."""
    files = [None if isinstance(each, SecurityVector) else Path(each) for each in vectors]
    short = [f"vector-{i}" if file is None else file.name for i, file in enumerate(files)]
    names = [str(file) if file and short.count(name) > 1 else name for name, file in zip(short, files, strict=True)]
    loaded = [each if isinstance(each, SecurityVector) else artifact.load(each) for each in vectors]
    digests = [artifact.digest(vector) for vector in loaded]
    if len(set(digests)) < len(digests) or len(set(names)) < len(names):
        raise UsageError(f"expected different vectors, found one of them twice: {', '.join(names)}")
    return dict(zip(names, loaded, strict=True))


def prepared(inputs: ScanInputs, done: int) -> Iterator[Prepared]:
    """Yield the rows from number `done` on, each cut at the limit."""
    rows = itertools.islice(zip(stream_samples(inputs.data), inputs.survey.repeated, strict=False), done, None)
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
        samples: list[Sample] = []
        for row, _ in chunk:
            if isinstance(row.sample, Sample):
                samples.append(inputs.escape.escaped(row.sample) if inputs.escape.forged(row.sample) else row.sample)
        # Uncut, so that a row without an answer within the context length is told from one that cannot be used.
        encoded = iter(encode_each(samples, inputs.tokenizer, max_length=2**63))
        for row, repeated in chunk:
            yield _first_look(inputs, row, bool(repeated), next(encoded) if isinstance(row.sample, Sample) else None)


def _first_look(inputs: ScanInputs, row: Row, repeated: bool, encoded: Encoded | RowError | None) -> Prepared:
    empty = not isinstance(row.sample, Sample) or any(
        message.role == "assistant" and not message.content.strip() for message in row.sample.messages
    )
    forged = isinstance(row.sample, Sample) and inputs.escape.forged(row.sample) is not None
    length = len(encoded.ids) if isinstance(encoded, Encoded) else 0
    flags = {
        "duplicate": repeated,
        "empty": empty,
        "truncated": length > inputs.limit,
        "special_tokens": forged,
        "unusable": isinstance(encoded, RowError),
    }
    cut = None if not isinstance(encoded, Encoded) else _cut(encoded, inputs.limit)
    reason = None
    if encoded is None or isinstance(encoded, RowError):
        reason = str(encoded or row.sample).removeprefix(f"{row.file}:{row.line}: ")
    elif cut is None:
        reason = f"no token to learn within the first {inputs.limit:,} of {length:,} tokens"
    found = ScannedRow(
        row.file,
        row.line,
        min(length, inputs.limit),
        truncated=flags["truncated"],
        flags=tuple(name for name in FLAGS if flags[name]),
        reason=reason,
    )
    return found, cut


def _cut(row: Encoded, limit: int) -> Encoded | None:
    cut = Encoded(row.ids[:limit], row.mask[:limit])
    return cut if any(cut.mask[1:]) else None
