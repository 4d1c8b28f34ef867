"""Fine-tuning runs that the methods share: by `secvec.train`, and folded without calibration and proof."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.methods.setting import Setting
from benchmarks.methods.whole import merge
from benchmarks.testbed.rows import Row
from secvec.companions import copy_companions
from secvec.errors import ProofError
from secvec.fold import fold
from secvec.models import load_tokenizer
from secvec.runfolder import RunFolder
from secvec.samples import from_rows
from secvec.tokens import Encoded, encode_all
from secvec.train import train
from secvec.trainer import Job
from secvec.trainer import run as run_trainer
from secvec.unfold import unfold
from secvec.vector import SecurityVector

REFUSED = "refused.txt"
"""Beside a run's folder: why secvec refused to publish its model."""


def trained(
    setting: Setting,
    rows: Sequence[Row],
    *,
    vectors: Sequence[SecurityVector] = (),
    calibrate: bool = False,
) -> Path:
    """Fine-tune with `secvec.train` and return the whole model; none is trained where no row is left.

    calibrate: give it the unwanted rows to calibrate the vectors on, which else bring back rows themselves.
    A model that cannot be proved defended is measured all the same, and the refusal kept beside it.
    """
    if not rows:
        return setting.model
    unwanted = [each.rows for each in setting.unwanted] if calibrate else []
    try:
        result = train(setting.model, rows, setting.out, vectors=vectors, unwanted=unwanted, config=setting.config)
        finished = result.model
    except ProofError as error:
        finished = RunFolder(setting.out.absolute()).unproved
        if not finished.is_dir():
            raise
        setting.out.with_name(REFUSED).write_text(str(error), encoding="utf-8")
    return whole(setting, finished, setting.model)


def folded(setting: Setting, vectors: Sequence[SecurityVector], *, serve_folded: bool = False) -> Path:
    """Fine-tune with vectors folded in, take them out, and return the whole model: no calibration, no proof.

    The same trainer as `secvec.train`. serve_folded: leave the vectors in.
    """
    source, out = setting.out / "folded", setting.out / "trained"
    setting.out.mkdir(parents=True, exist_ok=True)
    fold(setting.model, vectors, source)
    run_trainer(
        Job(
            source,
            encoded(setting, setting.training),
            load_tokenizer(setting.model),
            setting.config,
            setting.out / "checkpoints",
            out,
            setting.out / "metrics.jsonl",
        ),
        None,
    )
    if serve_folded:
        return whole(setting, out, source)
    unfold(out, setting.out / "unfolded", base=setting.model, folded=source)
    return whole(setting, setting.out / "unfolded", setting.model)


def whole(setting: Setting, finished: Path, base: Path) -> Path:
    """Return a folder that holds a whole model with its tokenizer."""
    if (finished / "adapter_config.json").exists():
        return merge(finished, base, setting.out / "merged")
    if not (finished / "tokenizer_config.json").exists():
        copy_companions(base, finished)
    return finished


def encoded(setting: Setting, rows: Sequence[Row]) -> list[Encoded]:
    """Return rows as the trainer sees them."""
    samples = from_rows(rows, name="rows").rows
    return encode_all(samples, load_tokenizer(setting.model), setting.config.max_length)
