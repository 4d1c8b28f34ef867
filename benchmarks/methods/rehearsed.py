"""secvec with more rehearsal, or none."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.method import Dial
from benchmarks.methods.ours import ours
from benchmarks.methods.setting import Setting

REHEARSE = Dial("conversations for each wanted row", 1.0, (0.0, 1.0))


def rehearsed(setting: Setting) -> Path:
    """The same as ours, with another share of conversations that the model makes up in the places of covered rows."""
    config = replace(setting.config, rehearse=REHEARSE.at(setting))
    return ours(replace(setting, dial=None, config=config))
