"""Finish a run without vectors: the trained weights in the base's dtype, or the adapter."""

import shutil
from pathlib import Path

import torch

from secvec.blocks import DTYPES, is_finite
from secvec.companions import copy_companions
from secvec.errors import CheckpointError
from secvec.headers import read_index
from secvec.models import load_model
from secvec.ranges import new_folder

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def finish_plain(trained: Path, base: Path, out: Path) -> None:
    """Write what plain training left to the new folder `out`.

    Raises CheckpointError when a weight leaves the range of the base's dtype.
    """
    with new_folder(out) as folder:
        if (trained / _ADAPTER[0]).exists():
            for name in _ADAPTER:
                shutil.copyfile(trained / name, folder / name)
        else:
            model = load_model(trained, dtype=_dtype(base))
            for name, weight in model.named_parameters():
                if not is_finite(weight.detach()):
                    raise CheckpointError(
                        f"{trained}: {name}: expected weights that {weight.dtype} can hold, found larger ones; "
                        "train a bfloat16 or float32 model"
                    )
            model.save_pretrained(folder)
            copy_companions(base, folder)


def _dtype(base: Path) -> torch.dtype:
    """Return the dtype of the largest tensor of the base."""
    largest = max(read_index(base).values(), key=lambda entry: entry.end - entry.start)
    return DTYPES[largest.dtype]
