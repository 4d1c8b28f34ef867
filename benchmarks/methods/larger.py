"""Tried: a calibrated vector in effect at more than its size."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import calibrated
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting

SIZE = Dial("times its scale", 2.0, (1.5, 2.0))


def larger(setting: Setting) -> Path:
    """The same as `kept` in one round, with each vector's change multiplied."""
    size = SIZE.at(setting)
    return folded(setting, [replace(vector, scale=size * vector.scale) for vector in calibrated(setting)])
