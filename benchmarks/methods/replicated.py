"""Security vectors as the one independent replication fitted them (arXiv 2405.14577, appendix F)."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting

STEP = Dial("lr of the fit", 4e-3, (1e-3, 4e-3, 1e-2))


def replicated(setting: Setting) -> Path:
    """Fit with CE alone: no KL, no anchors; arm, train, disarm.

    Rosati et al., "Representation Noising", table 1. Reproduced: the loss, and that all weights are trained afterwards.
    Differs: they fit on 10,000 rows for one epoch at lr 1e-3; here every method has the same 100 rows, so it goes
    around them as often as ours does. The default step size is ours for this width; theirs is in the sweep.
    """
    config = replace(setting.fit, lr=STEP.at(setting), kl_weight=0.0, representation_weight=0.0, margin=1.0)
    return folded(setting, fitted(setting, config))
