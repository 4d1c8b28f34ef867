"""One small training loop for methods that change the loss: the budget and the steps of `secvec.train`, row for row.

AdamW without weight decay, a step size that falls linearly to zero, gradients clipped at 1, the mean loss over answer
tokens: the defaults of TRL's trainer under `TrainConfig`. (tests/test_protection.py compares the two.)
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from benchmarks.methods.setting import Setting
from benchmarks.methods.whole import base_dtype, save_whole
from secvec.losses import mean_nats
from secvec.models import default_device, load_model
from secvec.sites import linear_sites
from secvec.tokens import Batch, Encoded, collate
from secvec.train_config import TrainConfig

Loss = Callable[[Batch], Tensor]


def trainee(setting: Setting) -> nn.Module:
    """Load the model in float32 with what `TrainConfig.method` trains: all weights, or a LoRA on every site."""
    set_seed(setting.config.seed)
    model = on_device(setting.model)
    return get_peft_model(model, task_lora(model, setting.config)) if setting.config.method == "lora" else model


def on_device(folder: Path) -> PreTrainedModel:
    """Load a model in float32 where there is most to compute with."""
    return load_model(folder, dtype=torch.float32).to(default_device())  # pyright: ignore


def task_lora(model: nn.Module, config: TrainConfig) -> LoraConfig:
    """Return the adapter that `secvec.train` trains: alpha is twice the rank."""
    return lora(model, config.lora_rank, alpha=2 * config.lora_rank)


def lora(model: nn.Module, rank: int, *, alpha: int, rank_stabilised: bool = False) -> LoraConfig:
    sites = linear_sites(model)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rank_stabilised,
        target_modules=list(sites),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in sites.values()),
        task_type="CAUSAL_LM",
    )


def fine_tune(
    model: nn.Module, batches: Sequence[Sequence[Encoded]], config: TrainConfig, loss: Loss | None = None
) -> None:
    """Train what requires a gradient, one step a batch; the loss is that of the answers unless one is given."""
    loss = loss or answer_loss(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=config.step_size, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    model.train()
    for rows in batches:
        loss(collate(rows, pad_id=0).to(device)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def answer_loss(model: nn.Module) -> Loss:
    """Return the mean nats per answer token under a model, as a function of a batch."""

    def loss(batch: Batch) -> Tensor:
        return mean_nats(model(**batch.inputs(), use_cache=False).logits, batch.ids, batch.mask)

    return loss


def epochs(rows: Sequence[Encoded], config: TrainConfig) -> list[list[Encoded]]:
    """Return the batches of all epochs, shuffled anew in each."""
    order, size = list(rows), config.batch_size * config.grad_accumulation
    rng = random.Random(config.seed)
    batches: list[list[Encoded]] = []
    for _ in range(config.epochs):
        rng.shuffle(order)
        batches += [order[start : start + size] for start in range(0, len(order), size)]
    return batches


def finish(model: nn.Module, setting: Setting) -> Path:
    """Write what was trained as a whole model, rounded as `secvec.train` would leave it."""
    if setting.config.method == "lora":
        return save_whole(model.merge_and_unload(), setting.model, setting.out, None)  # pyright: ignore
    return save_whole(model, setting.model, setting.out, base_dtype(setting.model))  # pyright: ignore
