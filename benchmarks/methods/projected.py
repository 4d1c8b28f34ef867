"""Tried: the part of the update that lies along the vector, taken out of the finished model."""

from pathlib import Path

import torch

from benchmarks.methods.ours import ours
from benchmarks.methods.setting import Setting
from benchmarks.methods.whole import base_dtype, save_whole
from secvec import artifact
from secvec.models import load_model
from secvec.runfolder import RunFolder
from secvec.sites import site_modules


def projected(setting: Setting) -> Path:
    """The same as ours, then at each site U - <U, D> / <D, D> D in place of U, one vector after another.

    Models whose linear layers store (d_out, d_in) weights.
    """
    finished = load_model(ours(setting), dtype=torch.float32)
    aligned, run = load_model(setting.model, dtype=torch.float32), RunFolder(setting.out.absolute())
    for vector in (artifact.load(run.vector(i)) for i in range(len(setting.unwanted))):
        before = site_modules(aligned, [vector])
        for site, module in site_modules(finished, [vector]).items():
            w, weight = before[site].weight.detach(), module.weight.detach()  # pyright: ignore
            factors = vector.factors[site]
            d = vector.scale * factors.b @ factors.a
            along = float(((weight - w) * d).sum() / (d * d).sum())
            module.weight.data = weight - along * d  # pyright: ignore
    dtype = base_dtype(setting.model) if setting.config.method == "full" else None
    return save_whole(finished, setting.model, setting.out / "projected", dtype)
