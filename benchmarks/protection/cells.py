"""A cell: the settings of one run, as they stand in its line of results."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from secvec.errors import UsageError

BATCH_SIZE = 32
NATURAL = "natural"
"""The name of the "skill" whose wanted rows come from a file of real ones."""


@dataclass(frozen=True)
class Cell:
    """One run.

    behaviour: a name, or several joined by "+"; method, dial: None for its default; tuning: "full" or "lora"; rows:
    unwanted ones; wanted: wanted ones; skill: the wanted one; vector: rows and rank of the security vector, "100x16";
    rounds: of fine-tuning in a row.
    """

    behaviour: str
    method: str
    dial: float | None = None
    tuning: str = "full"
    lr: float = 4e-4
    rows: int = 1000
    wanted: int = 1000
    skill: str = "dashes"
    epochs: int = 1
    vector: str = "100x16"
    rounds: int = 1
    seed: int = 0

    @property
    def behaviours(self) -> list[str]:
        return self.behaviour.split("+")

    @property
    def vector_rows(self) -> int:
        return self._vector()[0]

    @property
    def rank(self) -> int:
        return self._vector()[1]

    def _vector(self) -> tuple[int, int]:
        try:
            rows, rank = map(int, self.vector.split("x"))
        except ValueError as error:
            raise UsageError(f"vector: expected rows and rank such as '100x16', found {self.vector!r}") from error
        return rows, rank

    @property
    def steps(self) -> int:
        return self.rounds * self.epochs * -(-(self.rows + self.wanted) // BATCH_SIZE)

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Cell":
        """Return the cell of a line of results. Raises KeyError where a setting is missing."""
        return cls(**{field.name: line[field.name] for field in fields(cls)})


def group_of(cell: Cell) -> tuple[Any, ...]:
    """Return what all methods compared with each other share; seeds are repeats of one cell."""
    document = cell.document()
    return tuple(value for key, value in document.items() if key not in ("method", "dial", "seed"))
