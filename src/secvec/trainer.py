"""TRL's supervised trainer on rows that are tokens already: the same tokens that fitting, scanning and the proof see.

Imports trl, datasets and peft: import this module only where training starts.
"""

import dataclasses
import difflib
import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from secvec.atomic import atomic_write
from secvec.checkpoints import newest_verified, prune, seal, step_of
from secvec.errors import CheckpointError, UsageError
from secvec.models import load_model
from secvec.sites import linear_sites
from secvec.tokens import Encoded, pad_id
from secvec.train_config import Progress, TrainConfig

_IGNORED = -100
# LoRA's alpha / rank, as in the LoRA paper's (arXiv 2106.09685) common practice.
_LORA_SCALE = 2

_RECOMPUTE = ("activation_checkpointing", "gradient_checkpointing")

_OURS = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accumulation",
    "max_length": "max_length",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "dtype",
    "fp16": "dtype",
    "save_steps": "save_every",
    "report_to": "report_to",
}
_REFUSED = {
    "it would publish a model with the security vector in it": (
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        "hub_revision",
    ),
    "the rows are tokenised already, the same for the vector, the training and the proof": (
        *("model_init_kwargs", "trust_remote_code", "chat_template_path", "dataset_text_field", "dataset_kwargs"),
        *("dataset_num_proc", "eos_token", "pad_token", "truncation_mode", "shuffle_dataset", "packing"),
        *("packing_strategy", "padding_free", "eval_packing", "completion_only_loss", "assistant_only_loss"),
        *("remove_unused_columns", "label_names"),
    ),
    "a killed run could not go on from its checkpoints, bit for bit": (
        *("output_dir", "save_strategy", "save_total_limit", "save_only_model", "save_on_each_node"),
        *("ignore_data_skip", "resume_from_checkpoint", "auto_find_batch_size", "accelerator_config"),
        "restore_callback_states_from_checkpoint",
    ),
    "there are no evaluation rows; use `secvec eval` on the result": (
        *("do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "batch_eval_metrics"),
    ),
    "`train` runs in one process; fold the model (`secvec fold`) and train it with your own launcher": (
        *("deepspeed", "fsdp", "fsdp_config", "parallelism_config"),
    ),
}


def check_settings(config: TrainConfig) -> None:
    """Refuse settings for the trainer that it does not know, that have a field of ours, or that would harm the run.

    Raises UsageError.
    """
    known = [field.name for field in dataclasses.fields(SFTConfig)]
    for key in config.trainer:
        if key not in known:
            near = ", ".join(difflib.get_close_matches(key, known, n=3)) or "the fields of trl.SFTConfig"
            raise UsageError(f"trainer.{key}: unknown setting of the trainer; expected one of {near}")
        if key in _OURS:
            raise UsageError(f"trainer.{key}: set {_OURS[key]!r} instead")
        for reason, keys in _REFUSED.items():
            if key in keys:
                raise UsageError(f"trainer.{key}: refused, {reason}")
    if torch.cuda.device_count() > 1:
        raise UsageError(
            f"expected one GPU, found {torch.cuda.device_count()}: make one visible (CUDA_VISIBLE_DEVICES=0), "
            "or fold the model (`secvec fold`) and train it with your own launcher"
        )
    _sft_config(config, Path("checkpoints"))


@dataclasses.dataclass(frozen=True)
class Job:
    """What to train on and where to write: `source` is the (folded) model, `trained` the new folder for the result."""

    source: Path
    rows: Sequence[Encoded]
    tokenizer: PreTrainedTokenizerBase
    config: TrainConfig
    checkpoints: Path
    trained: Path
    metrics: Path


def run(job: Job, progress: Progress | None) -> None:
    """Train, from the newest verified checkpoint if there is one, and write the model or adapter.

    Raises CheckpointError when the disk is full or cannot be written; the run can then be resumed.
    """
    checkpoint = newest_verified(job.checkpoints)
    _cut_metrics(job.metrics, step_of(checkpoint) if checkpoint else 0)
    trainer = _trainer(job, progress)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.model.save_pretrained(job.trained)  # pyright: ignore
    except (OSError, SafetensorError, RuntimeError) as error:
        if _is_write_error(error):
            raise CheckpointError(
                f"{job.checkpoints.parent}: could not be written: {str(error).splitlines()[0]}; "
                "free some space, then go on with --resume"
            ) from error
        raise


class _Trainer(SFTTrainer):
    """TRL's trainer without what it does for itself."""

    def _send_telemetry(self) -> None:
        """Send nothing to anyone."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write no card: the one of a folded model would invite to use it."""


def _trainer(job: Job, progress: Progress | None) -> SFTTrainer:
    model = load_model(job.source, dtype=_weights_dtype(job.config))
    model.train()
    trainer = _Trainer(
        model=model,
        args=_sft_config(job.config, job.checkpoints),
        train_dataset=_dataset(job.rows),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=pad_id(job.tokenizer)),
        processing_class=job.tokenizer,
        callbacks=[_Metrics(job.metrics), _Progress(progress), _Checkpoints(job.checkpoints)],
        peft_config=_lora(model, job.config) if job.config.method == "lora" else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _dataset(rows: Sequence[Encoded]) -> Dataset:
    labels = [[token if marked else _IGNORED for token, marked in zip(row.ids, row.mask, strict=True)] for row in rows]
    return Dataset.from_dict({"input_ids": [list(row.ids) for row in rows], "labels": labels})


def _sft_config(config: TrainConfig, checkpoints: Path) -> SFTConfig:
    defaults: dict[str, Any] = {"logging_first_step": True, "weight_decay": 0.0, **_whole_activations(config)}
    try:
        return SFTConfig(
            **{**defaults, **config.trainer},
            output_dir=str(checkpoints),
            learning_rate=config.step_size,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.grad_accumulation,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=config.seed,
            data_seed=config.seed,
            bf16=config.dtype == "auto" and _has_bf16(),
            fp16=False,
            save_strategy="steps",
            save_steps=config.save_every,
            report_to=config.report_to,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"trainer: the trainer refuses its settings: {str(error).splitlines()[0]}") from error


def _whole_activations(config: TrainConfig) -> dict[str, bool]:
    """Switch off recomputing activations, TRL's default, unless it was asked for, by its new name or its old one."""
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    names = [name for name in _RECOMPUTE if name in known]
    return {} if any(name in config.trainer for name in _RECOMPUTE) else {names[0]: False}


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


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
        seal(self._folder / f"checkpoint-{state.global_step}")
        self._sealed_step = state.global_step
        prune(self._folder)


class _Metrics(TrainerCallback):
    """Write every log line of the trainer to a file of JSON lines."""

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


def _is_write_error(error: BaseException) -> bool:
    """Tell a full disk from other failures; torch and safetensors report it in words of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    words = ("No space left", "File too large", "file write failed", "PytorchStreamWriter", "unexpected pos")
    return any(word in str(error) for word in words)
