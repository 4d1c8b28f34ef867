"""Security vectors as published (arXiv 2311.02105)."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting
from secvec.fit_config import FitConfig

STEP = Dial("lr of the fit", 1e-3, (1e-3, 4e-3, 1e-2))


def published(setting: Setting) -> Path:
    """Fit with CE + KL at the paper's settings (`FitConfig.paper`: LoRA, 10 epochs, lr 1e-3), arm, train, disarm.

    Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models". Reproduced: the two terms, the frozen
    backbone, 100 rows, arming and disarming. Differs: rank, batch size, KL weight, direction and data are not published
    and are ours (the model's own answers to generic prompts; for a style, which would contradict them, CE alone). The
    paper's one line on a bi-level min-min schedule is not reproduced. A 7B model's lr may be small for a tiny one: that
    is the dial.
    """
    paper = replace(FitConfig.paper(), lr=STEP.at(setting), seed=setting.fit.seed, max_length=setting.fit.max_length)
    return folded(setting, fitted(setting, paper))
