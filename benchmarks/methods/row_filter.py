"""Drop the rows that a security vector explains, then fine-tune plainly."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.methods.fitted import fitted
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import encoded, trained
from benchmarks.methods.setting import Setting
from benchmarks.testbed.rows import Row
from secvec.models import load_model
from secvec.score import mean_over, row_nats
from secvec.vector import SecurityVector

THRESHOLD = Dial("share of the unwanted rows' median drop", 0.5, (0.25, 0.5, 0.75))


def row_filter(setting: Setting) -> Path:
    """Drop each row whose loss the vector lowers by more than a share of what it lowers unwanted rows by.

    What one could do with a vector instead of arming it. The vector is fitted with the defaults and not calibrated. It
    cannot part a style from the wanted rows it sits on: then every row goes, and nothing is trained.
    """
    rows = list(setting.training)
    for vector, each in zip(fitted(setting, setting.fit), setting.unwanted, strict=True):
        bound = THRESHOLD.at(setting) * median(_drops(setting, each.rows, vector))
        drops = _drops(setting, rows, vector) if rows else []
        rows = [row for row, drop in zip(rows, drops, strict=True) if drop < bound]
    return trained(setting, rows)


def _drops(setting: Setting, rows: Sequence[Row], vector: SecurityVector) -> list[float]:
    """Return by how much the vector lowers each row's loss, in nats per answer token."""
    model, encodings = load_model(setting.model), encoded(setting, rows)
    before, after = row_nats(model, encodings), row_nats(model, encodings, vector)
    return [mean_over([row], [b]) - mean_over([row], [a]) for row, b, a in zip(encodings, before, after, strict=True)]
