"""Fine-tuning on the wanted rows alone."""

from itertools import cycle, islice
from pathlib import Path

from benchmarks.methods.runs import encoded, trained, whole
from benchmarks.methods.setting import Setting
from secvec.models import load_model, load_tokenizer
from secvec.rehearsal import rehearse
from secvec.trainer import Job
from secvec.trainer import run as run_trainer


def oracle(setting: Setting) -> Path:
    """Fine-tune on the wanted rows only, told apart by an oracle: the best any defence can hope for."""
    return trained(setting, setting.wanted)


def longer_oracle(setting: Setting) -> Path:
    """Fine-tune on the wanted rows over and over, for as many steps as the whole file takes.

    The oracle's file is shorter, so that it learns and forgets less.
    """
    return trained(setting, list(islice(cycle(setting.wanted), len(setting.training))))


def rehearsed_oracle(setting: Setting) -> Path:
    """Fine-tune on the wanted rows and, in the places of the unwanted ones, on conversations that the model makes up.

    What rehearsal gives to one who knows the unwanted rows. No vector is there to leave out the model's own refusals.
    """
    tokenizer, config = load_tokenizer(setting.model), setting.config
    wanted, places = encoded(setting, setting.wanted), len(setting.training) - len(setting.wanted)
    made = rehearse(load_model(setting.model), tokenizer, [], places, max_length=config.max_length, seed=config.seed)
    rows = [*wanted, *islice(cycle(made), places)]
    setting.out.mkdir(parents=True, exist_ok=True)
    checkpoints, out = setting.out / "checkpoints", setting.out / "trained"
    run_trainer(Job(setting.model, rows, tokenizer, config, checkpoints, out, setting.out / "metrics.jsonl"), None)
    return whole(setting, out, setting.model)
