"""Tried: a vector that is fitted where training will have moved the weights."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import calibrated
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting
from secvec.provenance import digest_model
from secvec.vector import SecurityVector

_TIMES = 2


def min_min(setting: Setting) -> Path:
    """Fit, fine-tune a copy that is thrown away, fit again on that copy, and so on; then train with the last vector.

    After the paper's min-min problem (arXiv 2311.02105). Each vector is calibrated for the training file and fitted
    from the start. No calibration, proof or choice of rows in the last training, as in `kept`, to compare with.
    """
    vectors = _fitted(setting, setting.model)
    for number in range(_TIMES):
        moved = folded(replace(setting, out=setting.out / f"copy-{number}"), vectors)
        vectors = _fitted(setting, moved)
    return folded(setting, vectors)


def _fitted(setting: Setting, model: Path) -> list[SecurityVector]:
    """Fit on a model what is then used on the aligned one."""
    base = digest_model(setting.model)
    return [replace(vector, info=replace(vector.info, base=base)) for vector in calibrated(setting, model)]
