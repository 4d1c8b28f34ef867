"""Write finished models as ordinary folders: an adapter merged into its base, or weights in the base's dtype."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from secvec.companions import copy_companions
from secvec.models import load_model


def save_whole(model: PreTrainedModel, base: Path, out: Path, dtype: torch.dtype | None) -> Path:
    """Write a model with the tokenizer of `base` to the new folder `out`; in its own dtype unless one is given."""
    (model if dtype is None else model.to(dtype)).save_pretrained(out)  # pyright: ignore
    copy_companions(base, out)
    return out


def merge(adapter: Path, base: Path, out: Path) -> Path:
    """Write `base` with a LoRA adapter merged into it, in float32: what base and adapter compute side by side."""
    model = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), str(adapter))
    return save_whole(model.merge_and_unload(), base, out, None)  # pyright: ignore


def base_dtype(base: Path) -> torch.dtype:
    return load_model(base).dtype
