"""Tried: the vector in effect only for the rows that it covers, with hooks; other rows train without it."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.methods.fitted import calibrated
from benchmarks.methods.loop import epochs, fine_tune, finish, on_device, trainee
from benchmarks.methods.runs import encoded
from benchmarks.methods.setting import Setting
from secvec.arm import live
from secvec.covered import covered_rows
from secvec.losses import mean_nats
from secvec.sites import site_modules
from secvec.tokens import Batch
from secvec.vector import SecurityVector


def per_row(setting: Setting) -> Path:
    """Calibrate as ours does, then arm row by row. Every token carries loss, full fine-tuning."""
    vectors = calibrated(setting)
    rows = encoded(setting, setting.training)
    covered = {rows[each.row].ids for each in covered_rows(on_device(setting.model), rows, vectors)}
    model = trainee(setting)
    modules = site_modules(model, vectors)

    def loss(batch: Batch) -> Tensor:
        lengths = batch.attention.sum(1).tolist()
        ids = zip(batch.ids.tolist(), lengths, strict=True)
        known = torch.tensor([tuple(row[:length]) in covered for row, length in ids], device=batch.ids.device)
        parts = [summed(batch, known, vectors), summed(batch, ~known, ())]
        return torch.stack([part for part in parts if part is not None]).sum() / batch.mask[:, 1:].sum()

    def summed(batch: Batch, chosen: Tensor, effective: Sequence[SecurityVector]) -> Tensor | None:
        part = Batch(batch.ids[chosen], batch.attention[chosen], batch.mask[chosen])
        if not len(part.ids):
            return None
        with ExitStack() as stack:
            for vector in effective:
                stack.enter_context(live(modules, vector.factors, vector.scale))
            logits = model(**part.inputs(), use_cache=False).logits
        return mean_nats(logits, part.ids, part.mask) * part.mask[:, 1:].sum()

    fine_tune(model, epochs(rows, setting.config), setting.config, loss)
    return finish(model, setting)
