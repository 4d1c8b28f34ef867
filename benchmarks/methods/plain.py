"""Undefended fine-tuning on the whole file."""

from pathlib import Path

from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting


def plain(setting: Setting) -> Path:
    """Fine-tune on everything, undefended: what the learned fractions are measured against."""
    return trained(setting, setting.training)
