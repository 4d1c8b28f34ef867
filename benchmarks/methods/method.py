"""A method: a function from a setting to the finished model's folder, with the one dial that matters most to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.methods.setting import Setting, Unwanted
from benchmarks.testbed.rows import Row


@dataclass(frozen=True)
class Dial:
    """A method's main setting: its default, and a small sweep so that "best" can be reported beside "default"."""

    name: str
    default: float
    sweep: tuple[float, ...]

    def at(self, setting: Setting) -> float:
        return self.default if setting.dial is None else setting.dial


AsTrained = Callable[[Row, Sequence[Unwanted], float | None], Row]
"""Put a row into the form in which the method trains on it, given the behaviours and the dial."""


def unchanged(row: Row, unwanted: Sequence[Unwanted], dial: float | None) -> Row:
    return row


@dataclass(frozen=True)
class Method:
    """A method and its dial. as_trained: training-like contexts are where a conditional behaviour leaks."""

    run: Callable[[Setting], Path]
    dial: Dial | None = None
    as_trained: AsTrained = unchanged
