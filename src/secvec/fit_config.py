"""The settings of `secvec fit`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from secvec.errors import ArtifactError, UsageError
from secvec.settings import check_seed

KINDS = ("topic", "trait")
_MARGINS = {"topic": 2.0, "trait": 1.0}
"""A trait's vector with more takes the skill of the same rows for its own."""
_EPOCHS = {"topic": 20, "trait": 30}
"""More give a topic's vector next to nothing (docs/log.md, 2026-11-28)."""


@dataclass(frozen=True)
class FitConfig:
    """How a vector is fitted. The defaults are those of the prototype (docs/log.md).

    rank          of A and B at every site
    scale         of the change `scale * B @ A` (LoRA's alpha / rank)
    lr            AdamW's step size; None: 5e-3 * sqrt(128 / hidden size), which meets the prototype's 5e-3 at width
                  128 and the paper's 1e-3 at width 4096
    epochs        passes over the unwanted rows, at most (early stopping may end the fit before); None: 20 for a topic,
                  30 for a trait
    batch_size    rows a step, unwanted and anchor rows each
    kl_weight     weight of KL(unarmed || armed) on anchor tokens (the paper's constraint)
    representation_weight   weight of the relative squared distance of hidden states on anchor tokens (ours), which
                  grows with the square of the margin
    margin        the unwanted rows are fitted at scale / margin, so that the vector has more than it needs; None: 2 for
                  a topic, 1 for a trait (docs/decisions/013-margin.md)
    holdout       share of the unwanted rows (and of the anchors) kept for early stopping and the stated metrics
    patience      epochs without a better held-out loss before the fit stops
    max_length    tokens a row
    calibration_rows   rows of a training file that calibration looks at
    seed          of the factors, the hold-out and the order of the rows
    """

    rank: int = 16
    scale: float = 2.0
    lr: float | None = None
    epochs: int | None = None
    batch_size: int = 16
    kl_weight: float = 1.0
    representation_weight: float = 3.0
    margin: float | None = None
    holdout: float = 0.1
    patience: int = 8
    max_length: int = 1024
    calibration_rows: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"rank": self.rank, "epochs": self.passes, "batch_size": self.batch_size, "patience": self.patience}
        positive |= {"max_length": self.max_length, "calibration_rows": self.calibration_rows}
        for name, value in positive.items():
            if value < 1:
                raise UsageError(f"FitConfig.{name}: expected at least 1, found {value!r}")
        check_seed("FitConfig", self.seed)
        for name, value in (("scale", self.scale), ("lr", self.lr), ("margin", self.margin)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"FitConfig.{name}: expected a positive number, found {value!r}")
        if not 0 < self.holdout < 1:
            raise UsageError(f"FitConfig.holdout: expected a share between 0 and 1, found {self.holdout!r}")
        for name, value in (("kl_weight", self.kl_weight), ("representation_weight", self.representation_weight)):
            if not 0 <= value < math.inf:
                raise UsageError(f"FitConfig.{name}: expected 0 or more, found {value!r}")

    @classmethod
    def paper(cls) -> Self:
        """Return the published settings (arXiv 2311.02105): LoRA, 10 epochs, lr 1e-3, CE + KL.

        Rank, scale and batch size are not published; 8, 2 and 8 are ours.
        """
        return cls(
            rank=8, scale=2.0, lr=1e-3, epochs=10, batch_size=8, representation_weight=0.0, margin=1.0, patience=10
        )

    def for_kind(self, kind: str) -> Self:
        """Return the settings with those of a kind where they are None."""
        margin = _MARGINS[kind] if self.margin is None else self.margin
        return replace(self, margin=margin, epochs=_EPOCHS[kind] if self.epochs is None else self.epochs)

    @classmethod
    def recorded(cls, settings: Mapping[str, Any]) -> Self:
        """Return the settings that a vector states. Raises ArtifactError where this version does not know them."""
        try:
            return cls(**settings)
        except (TypeError, UsageError) as error:
            raise ArtifactError(f"a vector fitted with settings that this version does not know: {error}") from error

    @property
    def passes(self) -> int:
        """`epochs`; where no kind is known, a topic's."""
        return _EPOCHS["topic"] if self.epochs is None else self.epochs

    @property
    def distance_weight(self) -> float:
        """The weight of the distance of hidden states, which goes with the square of the vector's size."""
        return self.representation_weight * (self.margin or 1.0) ** 2

    def step_size(self, hidden_size: int) -> float:
        return self.lr if self.lr is not None else 5e-3 * math.sqrt(128 / hidden_size)
