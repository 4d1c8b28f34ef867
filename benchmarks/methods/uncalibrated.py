"""secvec without calibration."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.ours import ANCHORING
from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting


def uncalibrated(setting: Setting) -> Path:
    """The same as ours, not calibrated for the training file: what a trainer of one's own on a folded model does."""
    config = replace(setting.fit, representation_weight=ANCHORING.at(setting))
    as_it_is = replace(setting, config=replace(setting.config, calibrate=False))
    return trained(as_it_is, setting.training, vectors=fitted(setting, config))
