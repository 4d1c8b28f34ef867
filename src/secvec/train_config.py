"""How `train` fine-tunes: its settings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from secvec.errors import UsageError
from secvec.settings import check_seed

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""


def named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """Return what tells a listener how far one thing is."""
    if progress is None:
        return None

    def report(done: int, total: int) -> None:
        progress(done, total, what)

    return report


@dataclass(frozen=True)
class TrainConfig:
    """How a model is fine-tuned.

    method        "full": every weight; "lora": a task adapter on every linear layer of the blocks
    lr            AdamW's step size; None: 2e-5 for full (TRL's default), 2e-4 for lora (ten times that: common
                  practice since the LoRA and QLoRA papers)
    epochs        passes over the rows (TRL's default, 3)
    batch_size    rows a step (TRL's default, 8)
    grad_accumulation   steps whose gradients add up before the weights move (1)
    max_length    tokens a row (TRL's default, 1024); longer rows are cut at the end, counted and reported
    seed          of the order of the rows, dropout and the adapter's start
    dtype         "auto": float32 weights (frozen ones under lora: the model's own dtype), bfloat16 arithmetic on GPUs
                  that have it; "float32": both; "bfloat16": weights too, half the memory, but updates smaller than
                  1/256 of a weight are lost
    lora_rank     of the task adapter (16); its alpha is twice that
    calibrate     whether to fit the vectors again for the file, so that they are silent on what else it teaches
                  (`secvec.fit.refit`); without the unwanted rows, on rows that a vector brings back (`secvec.recall`)
    rehearse      for each row that no vector covers, how many of the others are replaced by conversations that the
                  aligned model makes up, so that it forgets less (`secvec.rehearsal`; 0.1; 0: none). Much more would
                  hold back what the rows are to change in answers to any request.
    settle_rows   rows of the file, at most, on which a model defended against a trait is trained a little further after
                  the vector is out, without the trait (`secvec.settle`; 0: none)
    on_drift      what to do where the model, without its vectors, has gone half the way to the unwanted rows' armed
                  losses (`secvec.drift`; needs unwanted rows): "note" it in the proof, "stop" the training there, or
                  go on "slow", at a tenth of the step size
    save_every    steps between checkpoints (500, as in transformers); there is one at the end of each epoch too
    report_to     "none", "tensorboard", "wandb" or "trackio"; metrics.jsonl is always written
    trainer       further settings of trl.SFTConfig. Weight decay is 0 by default: decoupled decay pulls the folded
                  weights W + D to zero, so that it takes lr * decay * D off the result at every step.
    """

    method: Literal["full", "lora"] = "full"
    lr: float | None = None
    epochs: int = 3
    batch_size: int = 8
    grad_accumulation: int = 1
    max_length: int = 1024
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    lora_rank: int = 16
    calibrate: bool = True
    rehearse: float = 0.1
    settle_rows: int = 1000
    on_drift: Literal["note", "stop", "slow"] = "note"
    save_every: int = 500
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    trainer: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        positive = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "grad_accumulation": self.grad_accumulation,
            "max_length": self.max_length,
            "lora_rank": self.lora_rank,
            "save_every": self.save_every,
        }
        for name, value in positive.items():
            if value < 1:
                raise UsageError(f"TrainConfig.{name}: expected at least 1, found {value!r}")
        if self.settle_rows < 0:
            raise UsageError(f"TrainConfig.settle_rows: expected 0 or more, found {self.settle_rows!r}")
        if not 0 <= self.rehearse < math.inf:
            raise UsageError(f"TrainConfig.rehearse: expected 0 or more, found {self.rehearse!r}")
        check_seed("TrainConfig", self.seed)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"TrainConfig.lr: expected a positive number, found {self.lr!r}")
        for name, value, known in (
            ("method", self.method, ("full", "lora")),
            ("dtype", self.dtype, ("auto", "float32", "bfloat16")),
            ("on_drift", self.on_drift, ("note", "stop", "slow")),
            ("report_to", self.report_to, ("none", "tensorboard", "wandb", "trackio")),
        ):
            if value not in known:
                raise UsageError(f"TrainConfig.{name}: expected one of {', '.join(known)}, found {value!r}")

    @property
    def step_size(self) -> float:
        return self.lr if self.lr is not None else {"full": 2e-5, "lora": 2e-4}[self.method]
