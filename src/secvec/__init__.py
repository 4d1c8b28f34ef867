"""Fine-tune language models on untrusted data without learning unwanted behaviours."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from secvec import errors

if TYPE_CHECKING:
    from secvec.arm import armed, canary, is_armed
    from secvec.artifact import load, save
    from secvec.diagnose import Clues
    from secvec.evaluate import EvalConfig, evaluate
    from secvec.fit import fit
    from secvec.fit_config import FitConfig
    from secvec.fold import fold
    from secvec.inspect import inspect
    from secvec.peft_format import from_peft, to_peft
    from secvec.report import report
    from secvec.scan import ScanConfig, scan
    from secvec.train import TrainConfig, train
    from secvec.unfold import unfold
    from secvec.vector import SecurityVector

__version__ = "0.1.0"
__all__ = [
    "Clues",
    "EvalConfig",
    "FitConfig",
    "ScanConfig",
    "SecurityVector",
    "TrainConfig",
    "__version__",
    "armed",
    "canary",
    "errors",
    "evaluate",
    "fit",
    "fold",
    "from_peft",
    "inspect",
    "is_armed",
    "load",
    "report",
    "save",
    "scan",
    "to_peft",
    "train",
    "unfold",
]

_HOME = {
    "armed": "arm",
    "canary": "arm",
    "is_armed": "arm",
    "load": "artifact",
    "save": "artifact",
    "Clues": "diagnose",
    "EvalConfig": "evaluate",
    "evaluate": "evaluate",
    "FitConfig": "fit_config",
    "fit": "fit",
    "fold": "fold",
    "from_peft": "peft_format",
    "to_peft": "peft_format",
    "inspect": "inspect",
    "report": "report",
    "ScanConfig": "scan",
    "scan": "scan",
    "TrainConfig": "train",
    "train": "train",
    "unfold": "unfold",
    "SecurityVector": "vector",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use: importing secvec must not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'secvec' has no attribute {name!r}")
    value = getattr(import_module(f"secvec.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keep `secvec.train` the function: whoever imports the module of that name sets it as an attribute here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
