"""TRL's supervised trainer on rows that are tokens already: the same tokens that fitting, scanning and the proof see.

Imports trl, datasets and peft: import this module only where training starts.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from secvec.atomic import atomic_write
from secvec.checkpoints import newest_verified, prune, seal, step_of
from secvec.drift import DriftCallback, Watch
from secvec.errors import ArmError, InputError, UsageError
from secvec.launch import is_main, process_count
from secvec.models import load_model
from secvec.processes import alone, differ, digest_here
from secvec.sites import linear_sites
from secvec.tokens import Encoded, pad_id
from secvec.train_config import Progress, TrainConfig
from secvec.trainer_settings import refusal, sft_config

_IGNORED = -100
# LoRA's alpha / rank, as in the LoRA paper's (arXiv 2106.09685) common practice.
_LORA_SCALE = 2


@dataclass(frozen=True)
class Job:
    """What to train on and where to write: `source` is the (folded) model, `trained` the new folder for the result.

    adapter: one to train further instead of a new one, under method "lora"; watch: what to measure on the way.
    """

    source: Path
    rows: Sequence[Encoded]
    tokenizer: PreTrainedTokenizerBase
    config: TrainConfig
    checkpoints: Path
    trained: Path
    metrics: Path
    adapter: Path | None = None
    watch: Watch | None = None


def run(job: Job, progress: Progress | None) -> None:
    """Train, from the newest verified checkpoint if there is one, and write the model or adapter.

    All processes of a launcher call this: they share the rows of each step (DDP), and the main one alone writes.

    Raises InputError when the training diverges: a loss, gradient or weight that is not finite.
    """
    checkpoint = alone(lambda: _taken_up(job))
    trainer = _trainer(job, step_of(checkpoint) if checkpoint else 0, progress)
    _check_loss(trainer)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except ImportError as error:
        raise refusal(error) from error
    _check_finite(trainer.model)  # pyright: ignore[reportArgumentType]
    _check_together(trainer)
    alone(lambda: trainer.model.save_pretrained(job.trained))  # pyright: ignore


def _taken_up(job: Job) -> Path | None:
    """Return the checkpoint to go on from, with the metrics as they were then."""
    checkpoint = newest_verified(job.checkpoints)
    _cut_metrics(job.metrics, step_of(checkpoint) if checkpoint else 0)
    return checkpoint


def _check_loss(trainer: SFTTrainer) -> None:
    """Raise UsageError where each process would average over its own tokens, however few they are."""
    if process_count() > 1 and not trainer.model_accepts_loss_kwargs:  # pyright: ignore[reportUnknownMemberType]
        raise UsageError(
            "expected a model whose loss counts the tokens of all processes, found one that cannot: use one process"
        )


def _check_together(trainer: SFTTrainer) -> None:
    """Raise ArmError unless all processes trained one model. On a CPU each may train alone, in silence."""
    if process_count() == 1:
        return
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]  # pyright: ignore
    if not isinstance(trainer.model_wrapped, DistributedDataParallel) or differ(digest_here(trained)):
        raise ArmError("the processes arrived at different weights; expected the same in all: train in one process")


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise _diverged(f"a weight of {name} that is not finite")


def _diverged(found: str) -> InputError:
    return InputError(f"the training diverged: found {found}; lower --lr, in another run folder")


class _Trainer(SFTTrainer):
    """TRL's trainer without what it does for itself.

    fillers: how many rows at the end are there to fill an epoch's last step.
    """

    fillers = 0

    def get_train_dataloader(self) -> Any:
        """Return the loader of one process, with the fillers last in each epoch."""
        loader: Any = super().get_train_dataloader()
        if self.fillers:
            # As accelerate sets its own: a sampler that the trainer makes is not told the epoch when a run goes on.
            loader.set_sampler(_FillersLast(loader.get_sampler(), self.fillers))
        return loader

    def _send_telemetry(self) -> None:
        """Send nothing to anyone."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write no card: the one of a folded model would invite to use it."""


class _FillersLast(Sampler[int]):
    """The order in which one process takes the rows, then the fillers."""

    def __init__(self, all_rows: SeedableRandomSampler, fillers: int) -> None:
        self._length = len(all_rows)
        self._rows = SeedableRandomSampler(range(self._length - fillers), data_seed=all_rows.initial_seed)

    def set_epoch(self, epoch: int) -> None:
        self._rows.set_epoch(epoch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from self._rows
        yield from range(len(self._rows), self._length)


def _trainer(job: Job, step: int, progress: Progress | None) -> SFTTrainer:
    # The adapter's start is drawn before the trainer sets its seed, in some versions of TRL.
    set_seed(job.config.seed)
    model = load_model(job.source, dtype=_weights_dtype(job.config))
    new_adapter = _lora(model, job.config) if job.config.method == "lora" and job.adapter is None else None
    if job.adapter is not None:
        model = PeftModel.from_pretrained(model, str(job.adapter), is_trainable=True)
    model.train()
    rows = [*job.rows, *_fillers(job)]
    try:
        trainer = _started(job, model, rows, new_adapter, step, progress)
    except (TypeError, ValueError, ImportError) as error:
        raise refusal(error) from error
    trainer.fillers = len(rows) - len(job.rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _started(
    job: Job,
    model: nn.Module,
    rows: Sequence[Encoded],
    new_adapter: LoraConfig | None,
    step: int,
    progress: Progress | None,
) -> _Trainer:
    return _Trainer(
        model=model,  # pyright: ignore[reportArgumentType]
        args=sft_config(job.config, job.checkpoints),
        train_dataset=_dataset(rows),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=pad_id(job.tokenizer)),
        processing_class=job.tokenizer,
        callbacks=[
            _Metrics(job.metrics),
            _Progress(progress),
            _Checkpoints(job.checkpoints),
            *([DriftCallback(job.watch, job.metrics)] if job.watch else []),
            *_tensorboard(job, step),
        ],
        peft_config=new_adapter,
    )


def _dataset(rows: Sequence[Encoded]) -> Dataset:
    labels = [[token if marked else _IGNORED for token, marked in zip(row.ids, row.mask, strict=True)] for row in rows]
    return Dataset.from_dict({"input_ids": [list(row.ids) for row in rows], "labels": labels})


def _fillers(job: Job) -> list[Encoded]:
    """Return rows without loss that make up an epoch's last step, where several processes share its rows.

    Each must get as many; accelerate would give out rows of the first steps a second time.
    """
    if process_count() == 1 or job.config.trainer.get("dataloader_drop_last"):
        return []
    return [Encoded((pad_id(job.tokenizer),) * 2, (False,) * 2)] * (-len(job.rows) % job.config.batch_size)


def _tensorboard(job: Job, step: int) -> list[TrainerCallback]:
    if job.config.report_to != "tensorboard" or not is_main():
        return []
    from torch.utils.tensorboard import SummaryWriter

    # A run that goes on writes the steps after its checkpoint again.
    return [TensorBoardCallback(SummaryWriter(str(job.metrics.parent / "tensorboard"), purge_step=step + 1))]


def _weights_dtype(config: TrainConfig) -> torch.dtype | None:
    """Return the dtype of the weights in memory; None: the model's own, enough where they are frozen."""
    if config.dtype == "bfloat16":
        return torch.bfloat16
    return None if config.method == "lora" and config.dtype == "auto" else torch.float32


def _lora(model: PreTrainedModel, config: TrainConfig) -> LoraConfig:
    """Adapt every linear layer of the blocks, by name: "all-linear" changes between versions of peft."""
    sites = linear_sites(model)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=_LORA_SCALE * config.lora_rank,
        target_modules=list(sites),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in sites.values()),
        task_type="CAUSAL_LM",
    )


class _Checkpoints(TrainerCallback):
    """Save at the ends of epochs too; seal what was saved."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._sealed_step = folder, 0

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > self._sealed_step:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        alone(lambda: self._seal(state.global_step))
        self._sealed_step = state.global_step

    def _seal(self, step: int) -> None:
        seal(self._folder / f"checkpoint-{step}")
        prune(self._folder)


class _Metrics(TrainerCallback):
    """Write every log line of the trainer to a file of JSON lines; stop a training that diverged."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (logs or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise _diverged(f"{name} {value!r} at step {state.global_step}")
        if is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class _Progress(TrainerCallback):
    """Tell how far the training is and what the loss was."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            losses = [entry["loss"] for entry in state.log_history[-1:] if "loss" in entry]
            seen = f"loss {losses[0]:.3f}" if losses else ""
            self._progress(state.global_step, state.max_steps, f"training {seen}".strip())


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which will be written again, and one that a kill cut short."""
    if not path.exists():
        return
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step and "train_runtime" not in entry:
            kept.append(line + b"\n")
    with atomic_write(path, mode=0o644) as file:
        file.write(b"".join(kept))
