"""secvec as it is meant to be used."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting

ANCHORING = Dial("representation weight", 3.0, (1.0, 3.0, 10.0))


def ours(setting: Setting) -> Path:
    """Fit with the defaults, calibrate for the training file, train folded, unfold, prove."""
    config = replace(setting.fit, representation_weight=ANCHORING.at(setting))
    return trained(setting, setting.training, vectors=fitted(setting, config), calibrate=True)
