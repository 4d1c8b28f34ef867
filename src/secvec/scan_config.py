"""How `scan` reads and judges a data file: its settings."""

import math
from dataclasses import dataclass

from secvec.errors import UsageError


@dataclass(frozen=True)
class ScanConfig:
    """How a data file is scanned.

    max_length    tokens a row, at most the model's own context length; the rest of a longer row is not looked at
                  (1024, as in training)
    threshold     nats/token that a vector must lower a row's loss by to explain it; None: chosen from the unwanted rows
                  or, without them, from the losses in the vector's file (`secvec.threshold`)
    batch_tokens  tokens a forward pass, padding included (8,192: 0.8 GB of float32 logits at 25,000 words)
    window_rows   rows sorted by length together (2,048)
    escape_special_tokens   go on with rows that would forge a turn, written so that they do not
    """

    max_length: int = 1024
    threshold: float | None = None
    batch_tokens: int = 8192
    window_rows: int = 2048
    escape_special_tokens: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_length", self.max_length, 2),
            ("batch_tokens", self.batch_tokens, 1),
            ("window_rows", self.window_rows, 1),
        ):
            if value < least:
                raise UsageError(f"ScanConfig.{name}: expected at least {least}, found {value!r}")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise UsageError(
                f"ScanConfig.threshold: expected a finite number of 0 or more nats/token, found {self.threshold!r}"
            )
