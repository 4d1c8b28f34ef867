"""Security vectors for the behaviours of a setting."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.methods.setting import Setting, Unwanted
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.vector import SecurityVector


def fitted(setting: Setting, config: FitConfig, behaviours: Sequence[Unwanted] = ()) -> list[SecurityVector]:
    """Fit one vector a behaviour, by default those of the setting; weak ones are measured too."""
    return [
        fit(setting.model, each.rows, kind=each.kind, config=config, allow_weak=True)
        for each in behaviours or setting.unwanted
    ]


def calibrated(setting: Setting, model: Path | None = None) -> list[SecurityVector]:
    """Fit one vector a behaviour and calibrate it for the training file; model: another than the setting's."""
    return [
        fit(
            model or setting.model,
            each.rows,
            kind=each.kind,
            calibrate=setting.training,
            config=setting.fit,
            allow_weak=True,
        )
        for each in setting.unwanted
    ]
