"""The model before fine-tuning."""

from pathlib import Path

from benchmarks.methods.setting import Setting


def aligned(setting: Setting) -> Path:
    """Train nothing: the reference for what was there before."""
    return setting.model
