"""Mixing safe rows into the training file (arXiv 2309.07875)."""

import random
from pathlib import Path

from benchmarks.methods.method import Dial
from benchmarks.methods.runs import trained
from benchmarks.methods.safe import safe_rows
from benchmarks.methods.setting import Setting

SHARE = Dial("safe rows, share of the file", 0.03, (0.03, 0.1))


def safety_mix(setting: Setting) -> Path:
    """Add safe rows, 3 or 10 % of the file's, and fine-tune plainly.

    Bianchi et al., "Safety-Tuned LLaMAs", who find that 3 % suffice for instruction tuning. Reproduced: the shares.
    Differs: the safe answers are the aligned model's own; the file is untrusted here, theirs only lacks safe rows.
    """
    added = safe_rows(setting, max(round(SHARE.at(setting) * len(setting.training)), 1))
    rows = [*setting.training, *added]
    random.Random(f"safety/{setting.config.seed}").shuffle(rows)
    return trained(setting, rows)
