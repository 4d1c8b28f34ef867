"""Fine-tuning on the wanted rows alone."""

from itertools import cycle, islice
from pathlib import Path

from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting


def oracle(setting: Setting) -> Path:
    """Fine-tune on the wanted rows only, told apart by an oracle: the best any defence can hope for."""
    return trained(setting, setting.wanted)


def longer_oracle(setting: Setting) -> Path:
    """Fine-tune on the wanted rows over and over, for as many steps as the whole file takes.

    The oracle's file is shorter, so that it learns and forgets less.
    """
    return trained(setting, list(islice(cycle(setting.wanted), len(setting.training))))
