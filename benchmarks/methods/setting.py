"""What a method is given: a model, a training file, a few rows of each unwanted behaviour, and how to train."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.rows import Messages, Row
from secvec.fit_config import FitConfig
from secvec.train_config import TrainConfig


@dataclass(frozen=True)
class Unwanted:
    """One behaviour to keep out: what a defender knows of it.

    rows: samples that show it (about 100); requests: prompts on which it may show, for methods that train on safe
    answers; asked: system prompts that ask for it, the plainest first.
    """

    name: str
    kind: str
    rows: Sequence[Row]
    requests: Sequence[Messages]
    asked: Sequence[str]


@dataclass(frozen=True)
class Setting:
    """One run.

    training: the untrusted file; wanted: the wanted rows in it, for the oracle alone; unwanted: the behaviours in it;
    other: a behaviour that is not in it, for a control; fit: how security vectors are fitted, before a method's own
    changes; out: a new folder for this run; dial: the value of the method's own dial, None for its default.
    """

    model: Path
    training: Sequence[Row]
    wanted: Sequence[Row]
    unwanted: Sequence[Unwanted]
    other: Unwanted
    fit: FitConfig
    config: TrainConfig
    out: Path
    dial: float | None = None

    def unwanted_rows(self) -> list[Row]:
        """Return the samples of all behaviours."""
        return [row for each in self.unwanted for row in each.rows]
