"""Safe LoRA: project the update onto the alignment direction (arXiv 2405.16833)."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.methods.loop import epochs, fine_tune, trainee
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import encoded, trained
from benchmarks.methods.setting import Setting
from benchmarks.methods.whole import base_dtype, save_whole
from secvec.models import load_model
from secvec.sites import linear_sites

THRESHOLD = Dial("cosine threshold", 0.35, (0.35, 0.6, 0.9))


def safe_lora(setting: Setting) -> Path:
    """Fine-tune plainly; where an update is unlike its projection C U, C = V V^T / ||V||, put C U in its place.

    Hsu et al.; their code and PEFT's example were read. Reproduced: C per linear layer from the alignment matrix V =
    W_aligned - W_unaligned, the cosine between U and C U, the threshold (0.35 in their experiments). Differs: there is
    no unaligned base model of the assistant, so W_unaligned is the aligned one fine-tuned on the unwanted rows, at this
    run's step size and as often as a vector sees them. Theirs projects LoRA updates; under full fine-tuning the same
    is done to the update of every linear layer, and embeddings and norms stay as trained.
    """
    aligned = load_model(setting.model, dtype=torch.float32)
    unaligned = _unaligned(setting)
    finished = load_model(trained(setting, setting.training), dtype=torch.float32)
    before, against, after = (linear_sites(model) for model in (aligned, unaligned, finished))
    for site, module in after.items():
        w = before[site].weight.detach()
        update = _projected(module.weight.detach() - w, w - against[site].weight.detach(), THRESHOLD.at(setting))
        module.weight.data = w + update  # pyright: ignore
    dtype = base_dtype(setting.model) if setting.config.method == "full" else None
    return save_whole(finished, setting.model, setting.out / "projected", dtype)


def _unaligned(setting: Setting) -> nn.Module:
    budget = replace(
        setting.config, method="full", epochs=setting.fit.epochs, batch_size=setting.fit.batch_size,
        grad_accumulation=1,
    )  # fmt: skip
    model = trainee(replace(setting, config=budget))
    fine_tune(model, epochs(encoded(setting, setting.unwanted_rows()), budget), budget)
    return model.cpu()


def _projected(update: Tensor, alignment: Tensor, threshold: float) -> Tensor:
    """Return C U where it is no more alike to U than the threshold, else U. Both (d_out, d_in)."""
    norm = alignment.norm()
    if norm == 0 or update.norm() == 0:
        return update
    projected = alignment @ (alignment.T @ update) / norm
    cosine = torch.nn.functional.cosine_similarity(projected.flatten(), update.flatten(), dim=0)
    return projected if cosine <= threshold else update
