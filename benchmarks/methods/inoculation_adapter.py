"""Inoculation adapters (arXiv 2606.30252)."""

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import set_seed

from benchmarks.methods.loop import epochs, fine_tune, finish, lora, on_device, task_lora
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import encoded
from benchmarks.methods.setting import Setting
from secvec.errors import ArmError

STEP = Dial("lr of the adapter", 1e-3, (1e-4, 1e-3, 5e-3))
_RANK, _ALPHA = 32, 16


def inoculation_adapter(setting: Setting) -> Path:
    """Train a LoRA on the trait, attach it frozen while the task is trained, discard it.

    Riche et al. Reproduced with PEFT: two adapters side by side, rank 32, alpha 16, rank-stabilised scaling, all linear
    layers. Differs: the trait's lr of 1e-4 is for 1.5B parameters and in the sweep, the default is ten times that; it
    sees the 100 rows as often as a vector does. The task's rank, alpha and budget are those of every method here. The
    paper trains the task by LoRA only; under full fine-tuning all weights are trained beside the frozen adapter.
    """
    model = _with_trait(setting)
    before = _trait(model)
    if setting.config.method == "lora":
        model.add_adapter("task", task_lora(model.get_base_model(), setting.config))
        model.base_model.set_adapter(["trait", "task"])  # pyright: ignore
    # PEFT's calls above leave the trait trainable or the task frozen, depending on the version: set both here.
    trains = "task" if setting.config.method == "lora" else "whole"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_part(name) == trains)
    fine_tune(model, epochs(encoded(setting, setting.training), setting.config), setting.config)
    if any(not torch.equal(before[name], now) for name, now in _trait(model).items()):
        raise ArmError("the inoculation adapter changed while the task was trained; expected it frozen")
    return finish(_without_trait(model, setting), setting)


def _with_trait(setting: Setting) -> PeftModel:
    set_seed(setting.config.seed)
    base = on_device(setting.model)
    model = get_peft_model(base, lora(base, _RANK, alpha=_ALPHA, rank_stabilised=True), adapter_name="trait")
    budget = replace(
        setting.config, lr=STEP.at(setting), epochs=setting.fit.epochs, batch_size=setting.fit.batch_size,
        grad_accumulation=1,
    )  # fmt: skip
    fine_tune(model, epochs(encoded(setting, setting.unwanted_rows()), budget), budget)
    return model  # pyright: ignore


def _without_trait(model: PeftModel, setting: Setting) -> nn.Module:
    """Return the trained weights, or the model with the task adapter alone."""
    if setting.config.method == "full":
        return model.unload()  # pyright: ignore
    model.base_model.set_adapter(["task"])  # pyright: ignore
    model.delete_adapter("trait")
    return model


def _part(name: str) -> str:
    """Say what a parameter belongs to: the trait, the task, or the whole model."""
    return next((part for part in ("trait", "task") if f".{part}." in name), "whole")


def _trait(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if _part(name) == "trait"}
