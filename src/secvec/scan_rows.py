"""The lines of scan.jsonl: what was found in each row of a data file, never what the row says; no torch."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from secvec.errors import CheckpointError

FLAGS = ("duplicate", "empty", "truncated", "special_tokens", "unusable")


@dataclass(frozen=True, slots=True)
class ScannedRow:
    """One row. Losses in nats per token of the assistant's, None where the row could not be scored (`reason`).

    tokens: of the whole row within the context length; loss_armed: by vector; drop: unarmed minus armed, of the vector
    that lowers the loss most; vector: the one that explains the row, None where none does; flags: out of `FLAGS`.
    """

    file: str
    line: int
    tokens: int = 0
    loss_unarmed: float | None = None
    loss_armed: Mapping[str, float] = field(default_factory=dict[str, float])
    drop: float | None = None
    explained: bool = False
    vector: str | None = None
    truncated: bool = False
    flags: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def suspect(self) -> bool:
        """Tell whether the row is held back: explained, not scored, or refused by trainers for its special tokens."""
        return self.explained or self.drop is None or "special_tokens" in self.flags

    def encode(self) -> bytes:
        """Return the row's line. Raises ValueError on a loss that is not finite."""
        document = asdict(self)
        if self.reason is None:
            del document["reason"]
        return json.dumps(document, allow_nan=False).encode("ascii") + b"\n"


_ROW = TypeAdapter(ScannedRow)


def read_scan(path: Path) -> Iterator[ScannedRow]:
    """Yield the rows of a scan.jsonl. Raises CheckpointError on a line that is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _ROW.validate_json(line)
            except ValidationError as error:
                raise CheckpointError(
                    f"{path}:{number}: expected a scanned row, found something else; it was altered: scan anew in "
                    "another folder"
                ) from error


def keep_whole_windows(path: Path, window_rows: int, rows: int) -> int:
    """Cut what a kill left behind the last whole window of a scan.jsonl of `rows` rows; return the number kept."""
    kept = keep_bytes = seen_bytes = 0
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        for count, line in enumerate(file, start=1):
            seen_bytes += len(line)
            if line.endswith(b"\n") and (count % window_rows == 0 or count == rows):
                kept, keep_bytes = count, seen_bytes
        file.truncate(keep_bytes)
    return kept


@dataclass
class Totals:
    """What a scan found in all: counts of rows and of tokens."""

    rows: int = 0
    scored: int = 0
    explained: int = 0
    suspect: int = 0
    tokens: int = 0
    vectors: Counter[str] = field(default_factory=Counter[str])
    flags: Counter[str] = field(default_factory=Counter[str])
    first_unscored: str | None = None

    @classmethod
    def of(cls, rows: Iterator[ScannedRow]) -> "Totals":
        totals = cls()
        for row in rows:
            totals.rows += 1
            totals.scored += row.drop is not None
            totals.explained += row.explained
            totals.suspect += row.suspect
            totals.tokens += row.tokens
            totals.vectors.update([row.vector] if row.vector is not None else [])
            totals.flags.update(row.flags)
            if row.reason is not None and totals.first_unscored is None:
                totals.first_unscored = f"{row.file}:{row.line}: {row.reason}"
        return totals
