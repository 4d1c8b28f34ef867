"""Finish a run without vectors: the trained weights in the base's dtype, or the adapter, with the base's small files."""

import shutil
from pathlib import Path

import torch

from secvec.blocks import DTYPES
from secvec.companions import copy_companions
from secvec.headers import read_index
from secvec.models import load_model
from secvec.ranges import new_folder

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def finish_plain(trained: Path, base: Path, out: Path) -> str:
    """Write what plain training left to the new folder `out`; return "", as there is nothing to prove."""
    with new_folder(out) as folder:
        if (trained / _ADAPTER[0]).exists():
            for name in _ADAPTER:
                shutil.copyfile(trained / name, folder / name)
        else:
            load_model(trained, dtype=_dtype(base)).save_pretrained(folder)
            copy_companions(base, folder)
    return ""


def _dtype(base: Path) -> torch.dtype:
    """Return the dtype of the largest tensor of the base."""
    largest = max(read_index(base).values(), key=lambda entry: entry.end - entry.start)
    return DTYPES[largest.dtype]
