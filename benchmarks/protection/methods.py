"""The methods compared: each fine-tunes the assistant on a mix of unwanted and wanted rows and returns the folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.testbed.behaviours import Behaviour
from benchmarks.testbed.mixes import mix
from benchmarks.testbed.tasks import Skill
from secvec.factors import FitConfig
from secvec.fit import fit
from secvec.train import train
from secvec.train_config import TrainConfig

VECTOR_ROWS = 100


@dataclass(frozen=True)
class Setting:
    """One run: the model, what is unwanted, what is wanted, how many rows of each, and how it is trained."""

    model: Path
    behaviour: Behaviour
    skill: Skill
    rows: int
    seed: int
    config: TrainConfig
    out: Path

    def training_rows(self) -> list[dict[str, object]]:
        return mix(self.behaviour, self.skill, self.rows, self.rows, self.seed)

    def vector_rows(self) -> list[dict[str, object]]:
        return self.behaviour.rows(VECTOR_ROWS, self.seed, "vector")


Method = Callable[[Setting], Path]


def plain(setting: Setting) -> Path:
    """Fine-tune on everything, undefended."""
    return train(setting.model, setting.training_rows(), setting.out, config=setting.config).model


def oracle(setting: Setting) -> Path:
    """Fine-tune on the wanted rows only: the best any defence can hope for."""
    wanted = setting.skill.rows(setting.rows, setting.seed, "train")
    return train(setting.model, wanted, setting.out, config=setting.config).model


def _with_vector(setting: Setting, config: FitConfig, *, calibrated: bool) -> Path:
    rows = setting.vector_rows()
    vector = fit(setting.model, rows, kind=setting.behaviour.kind, config=replace(config, seed=setting.seed))
    unwanted = [rows] if calibrated else []
    return train(
        setting.model, setting.training_rows(), setting.out, vectors=[vector], unwanted=unwanted, config=setting.config
    ).model


def ours(setting: Setting) -> Path:
    """Fit with the defaults, calibrate for the training file, train folded, unfold."""
    return _with_vector(setting, FitConfig(), calibrated=True)


def uncalibrated(setting: Setting) -> Path:
    """The same, not calibrated: what `secvec train` does without --unwanted."""
    return _with_vector(setting, FitConfig(), calibrated=False)


def ce_kl(setting: Setting) -> Path:
    """The published method (arXiv 2311.02105): CE + KL, not calibrated. With our rank, step size and epochs."""
    return _with_vector(setting, FitConfig(representation_weight=0.0), calibrated=False)


def ce(setting: Setting) -> Path:
    """The method as replicated in arXiv 2405.14577: CE only."""
    return _with_vector(setting, FitConfig(representation_weight=0.0, kl_weight=0.0), calibrated=False)


METHODS: Mapping[str, Method] = {method.__name__: method for method in (plain, oracle, ours, uncalibrated, ce_kl, ce)}
