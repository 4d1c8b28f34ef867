"""Control: the vector forgotten inside the model."""

from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting


def still_folded(setting: Setting) -> Path:
    """Train folded and serve what the trainer wrote, never unfolded: must be visibly bad."""
    return folded(setting, fitted(setting, setting.fit), serve_folded=True)
