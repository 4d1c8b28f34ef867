"""Control: the right method, the wrong behaviour."""

from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting


def other_vector(setting: Setting) -> Path:
    """Train with a vector fitted on another behaviour, which the file does not hold: it should not protect."""
    return folded(setting, fitted(setting, setting.fit, [setting.other]))
