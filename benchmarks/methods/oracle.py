"""Fine-tuning on the wanted rows alone."""

from pathlib import Path

from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting


def oracle(setting: Setting) -> Path:
    """Fine-tune on the wanted rows only, told apart by an oracle: the best any defence can hope for."""
    return trained(setting, setting.wanted)
