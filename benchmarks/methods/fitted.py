"""Security vectors for the behaviours of a setting."""

from collections.abc import Sequence

from benchmarks.methods.setting import Setting, Unwanted
from secvec.factors import FitConfig
from secvec.fit import fit
from secvec.vector import SecurityVector


def fitted(setting: Setting, config: FitConfig, behaviours: Sequence[Unwanted] = ()) -> list[SecurityVector]:
    """Fit one vector a behaviour, by default those of the setting; weak ones are measured too."""
    return [
        fit(setting.model, each.rows, kind=each.kind, config=config, allow_weak=True)
        for each in behaviours or setting.unwanted
    ]
