"""secvec without the unwanted rows at training time."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.ours import ANCHORING
from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting


def recalled(setting: Setting) -> Path:
    """The same as ours, calibrated on rows that the vector brings back: what `secvec train` does without --unwanted."""
    config = replace(setting.fit, representation_weight=ANCHORING.at(setting))
    return trained(setting, setting.training, vectors=fitted(setting, config))
