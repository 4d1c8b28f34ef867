"""The settings of TRL's trainer: those that are ours, those that are the user's, and those that are refused.

Imports trl: import this module only where training starts.
"""

import dataclasses
import difflib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from trl.trainer.sft_config import SFTConfig

from secvec.errors import UsageError
from secvec.launch import process_count
from secvec.train_config import TrainConfig

_RECOMPUTE = ("activation_checkpointing", "gradient_checkpointing")

# Schedules that set the step size whatever it started from.
_OWN_PACE = ("reduce_lr_on_plateau", "greedy")

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
    "there are no evaluation rows; evaluate the result": (
        *("do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "batch_eval_metrics"),
    ),
    "`train` holds the whole model in each process; fold the model (`secvec fold`) and train it with your launcher": (
        *("deepspeed", "fsdp", "fsdp_config", "parallelism_config"),
    ),
}
# In several processes.
_REFUSED_TOGETHER = {
    "several processes would not take the steps of one": (
        *("average_tokens_across_devices", "train_sampling_strategy", "group_by_length"),
    ),
    "the launcher decides": ("use_cpu", "ddp_backend", "ddp_timeout"),
}
# As `accelerate launch` asks for a model that is not whole in each process.
_SHARDED = tuple(f"ACCELERATE_USE_{kind}" for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"))


def check_settings(config: TrainConfig) -> None:
    """Refuse settings for the trainer that it does not know, that have a field of ours, or that would harm the run.

    Raises UsageError.
    """
    types = {field.name: field.type for field in dataclasses.fields(SFTConfig)}
    known = list(types)
    for key, value in config.trainer.items():
        if key not in known:
            near = ", ".join(difflib.get_close_matches(key, known, n=3)) or "the fields of trl.SFTConfig"
            raise UsageError(f"trainer.{key}: unknown setting of the trainer; expected one of {near}")
        if key in _OURS:
            raise UsageError(f"trainer.{key}: set {_OURS[key]!r} instead")
        refused = _REFUSED | (_REFUSED_TOGETHER if process_count() > 1 else {})
        for reason, keys in refused.items():
            if key in keys:
                raise UsageError(f"trainer.{key}: refused, {reason}")
        if not _is_json(value):
            raise UsageError(f"trainer.{key}: expected a value that JSON can hold, found {value!r}")
        _check_number(key, value, types[key])
    _check_report_to(config.report_to)
    schedule = config.trainer.get("lr_scheduler_type")
    if config.on_drift == "slow" and schedule in _OWN_PACE:
        raise UsageError(f"on_drift: 'slow' cannot change the step size of trainer.lr_scheduler_type {schedule!r}")
    if config.trainer.get("activation_offloading") and not torch.accelerator.is_available():
        raise UsageError("trainer.activation_offloading: refused, there is no GPU to take activations off")
    _check_processes(config.batch_size)
    _check_pace(sft_config(config, Path("checkpoints")))


def sft_config(config: TrainConfig, checkpoints: Path) -> SFTConfig:
    """Return TRL's settings. Raises UsageError when it refuses them."""
    defaults: dict[str, Any] = {
        "logging_first_step": True,
        # The filter would log the average of the steps before in the place of a loss that is not finite.
        "logging_nan_inf_filter": False,
        "weight_decay": 0.0,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # On a CPU each process would train alone, in silence.
        "use_cpu": process_count() > 1 and not torch.accelerator.is_available(),
        **_whole_activations(config),
    }
    try:
        return SFTConfig(
            **{**defaults, **config.trainer},
            output_dir=str(checkpoints),
            learning_rate=config.step_size,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size // process_count(),
            gradient_accumulation_steps=config.grad_accumulation,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=config.seed,
            data_seed=config.seed,
            bf16=config.dtype == "auto" and _has_bf16(),
            fp16=False,
            save_strategy="steps",
            save_steps=config.save_every,
            # The trainer would write TensorBoard's files among the checkpoints, which are deleted.
            report_to="none" if config.report_to == "tensorboard" else config.report_to,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise refusal(error) from error


def refusal(error: Exception) -> UsageError:
    """Return what to raise where the trainer refuses its settings."""
    return UsageError(f"trainer: the trainer refuses its settings: {str(error).strip().splitlines()[0]}")


def _check_number(key: str, value: object, expected: object) -> None:
    """Refuse what is no number where the trainer, which does not look, would stumble over it in the middle of a run."""
    if expected is int and type(value) is not int:
        raise UsageError(f"trainer.{key}: expected a whole number, found {value!r}")
    if expected is float and type(value) not in (int, float):
        raise UsageError(f"trainer.{key}: expected a number, found {value!r}")


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _check_pace(args: SFTConfig) -> None:
    """Make the optimiser and the schedule for a single weight: what they refuse is to be known before the long work."""
    # Some optimisers can only be made for the model itself.
    if args.optim_target_modules or "lomo" in args.optim:
        return
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimiser = kind([nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimiser,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
        )
    except (TypeError, ValueError, ImportError) as error:
        raise refusal(error) from error


def _check_report_to(report_to: str) -> None:
    if report_to != "none" and find_spec(report_to) is None:
        raise UsageError(f"report_to: {report_to} is not installed; run: pip install {report_to}")
    uploads = os.environ.get("WANDB_LOG_MODEL", "false")
    if report_to == "wandb" and uploads.lower() not in ("false", "0", ""):
        raise UsageError(
            f"WANDB_LOG_MODEL={uploads}: refused, it would upload a model with the security vector in it; unset it"
        )


def _check_processes(batch_size: int) -> None:
    if (count := process_count()) == 1 and (gpus := torch.cuda.device_count()) > 1:
        raise UsageError(
            f"expected one GPU for one process, found {gpus}: make one visible (CUDA_VISIBLE_DEVICES=0), or start a "
            f"process for each (torchrun --nproc-per-node {gpus} --no-python secvec train ...)"
        )
    if batch_size % count:
        raise UsageError(
            f"batch_size: expected a multiple of the {count} processes, which share the rows of a step, "
            f"found {batch_size}"
        )
    if count > 1 and (asked := [name for name in _SHARDED if os.environ.get(name, "false").lower() in ("true", "1")]):
        raise UsageError(
            f"{asked[0]}: refused, `train` holds the whole model in each process; unset it, or fold the model "
            "(`secvec fold`), train it sharded with your launcher (docs/engines.md), and unfold it"
        )


def _whole_activations(config: TrainConfig) -> dict[str, bool]:
    """Switch off recomputing activations, TRL's default, unless it was asked for, by its new name or its old one."""
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    names = [name for name in _RECOMPUTE if name in known]
    return {} if any(name in config.trainer for name in _RECOMPUTE) else {names[0]: False}


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
