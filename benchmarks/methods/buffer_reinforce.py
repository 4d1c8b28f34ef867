"""Buffer-and-Reinforce (arXiv 2605.24550)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from benchmarks.methods.fitted import fitted
from benchmarks.methods.loop import epochs, fine_tune, on_device, task_lora
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import encoded
from benchmarks.methods.safe import safe_rows
from benchmarks.methods.setting import Setting
from benchmarks.methods.whole import base_dtype, save_whole
from benchmarks.testbed.rows import Row
from secvec.models import load_model
from secvec.sites import linear_sites
from secvec.train_config import TrainConfig
from secvec.vector import SecurityVector

WEIGHT = Dial("weight of ReinforceLoRA", 1.0, (0.0, 0.5, 1.0))
_SAFE_ROWS, _SAFE_EPOCHS = 400, 10
Updates = dict[str, Tensor]


def buffer_reinforce(setting: Setting) -> Path:
    """Train the task on a temporarily jailbroken model, then merge in a LoRA that learned to refuse in that state.

    Ham et al. Only the abstract could be read. Reproduced from it: BufferLoRA, trained on the unwanted rows, is active
    and frozen while the task is trained and removed afterwards; ReinforceLoRA is trained under the same state to give
    the aligned answers; both are joined "via QR decomposition-based merging to reinforce safety while preserving
    user-task performance". Guessed: BufferLoRA's settings (those of `replicated`); for ReinforceLoRA 400 safe rows, the
    step size of a vector's fit and ten epochs; the merge, W + U + w * (I - Q Q^T) R with Q the orthonormal basis, by
    QR, of the leading directions of U's output, as many as the task's LoRA has: what ReinforceLoRA writes there would
    disturb the task. Under full fine-tuning U is the update of all weights.
    """
    buffers = fitted(setting, replace(setting.fit, kl_weight=0.0, representation_weight=0.0))
    model = load_model(setting.model, dtype=torch.float32)
    step_size = setting.fit.step_size(int(model.config.hidden_size))
    safe = replace(setting.config, method="lora", lr=step_size, epochs=_SAFE_EPOCHS)
    user = _learned(setting, buffers, setting.training, setting.config)
    reinforce = _learned(setting, buffers, safe_rows(setting, _SAFE_ROWS), safe)
    for name, parameter in model.named_parameters():
        parameter.data += user.get(name, 0.0)
        if name in reinforce and name in user:
            parameter.data += WEIGHT.at(setting) * _beside(user[name], reinforce[name], setting.config.lora_rank)
    dtype = base_dtype(setting.model) if setting.config.method == "full" else None
    return save_whole(model, setting.model, setting.out, dtype)


def _learned(setting: Setting, buffers: Sequence[SecurityVector], rows: Sequence[Row], config: TrainConfig) -> Updates:
    """Return by how much each weight changes when the jailbroken model is trained on rows."""
    set_seed(config.seed)
    model = _jailbroken(setting.model, buffers)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = epochs(encoded(setting, rows), config)
    if config.method == "lora":
        adapted = get_peft_model(model, task_lora(model, config))
        fine_tune(adapted, batches, config)
        model = adapted.merge_and_unload()  # pyright: ignore
    else:
        fine_tune(model, batches, config)
    changes = {name: (parameter.detach() - start[name]).cpu() for name, parameter in model.named_parameters()}
    return {name: change for name, change in changes.items() if bool(change.any())}


def _jailbroken(folder: Path, buffers: Sequence[SecurityVector]) -> PreTrainedModel:
    model = on_device(folder)
    sites = linear_sites(model)
    for vector in buffers:
        for site in vector.sites:
            sites[site].weight.data += vector.delta(site).to(model.device, torch.float32)  # pyright: ignore
    return model


def _beside(user: Tensor, reinforce: Tensor, rank: int) -> Tensor:
    """Return the part of `reinforce` outside the leading `rank` output directions of `user`; both (d_out, d_in)."""
    directions = torch.linalg.svd(user, full_matrices=False)[0][:, :rank]
    basis = torch.linalg.qr(directions)[0]
    return reinforce - basis @ (basis.T @ reinforce)
