"""The variants of training that are compared: each a model, an optimiser and a step.

Everything that any of them needs is imported here, so that all pay for the same imports.
"""

import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as _llama  # noqa: F401  (from_pretrained would import it later)
from transformers.utils.logging import disable_progress_bar

from benchmarks.speed.checkpoint import RANK, SHAPES, Shape
from secvec.arm import armed
from secvec.artifact import load
from secvec.models import load_model
from secvec.sites import linear_sites

METHODS = ("full", "lora")
WAYS = ("plain", "folded", "hooked", "PEFT")


@dataclass(frozen=True)
class Workload:
    """What one step trains on: rows of random ids for a model of a shape."""

    shape: Shape
    rows: int
    tokens: int

    def ids(self, step: int) -> Tensor:
        """Draw the batch of a step: (rows, tokens)."""
        generator = torch.Generator().manual_seed(step)
        return torch.randint(self.shape.vocabulary, (self.rows, self.tokens), generator=generator)


# "1b" is the size of the files; two cores step this model of 3e7 parameters in one or two seconds.
WORKLOADS = {
    "1b": Workload(Shape(512, 1536, 8, 8, 8, 8192, 4), rows=4, tokens=256),
    "tiny": Workload(SHAPES["tiny"], rows=2, tokens=16),
}


@dataclass(frozen=True)
class Trainee:
    """A model in training, with AdamW on whatever of it is trained."""

    model: Any
    optimizer: torch.optim.Optimizer

    def step(self, ids: Tensor) -> float:
        """Train one step on a batch and return the seconds it took."""
        start_s = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start_s


@contextmanager
def trainee(folder: Path, method: str, way: str) -> Generator[Trainee]:
    """Load a variant from a folder written by `checkpoint.prepare`; its vector is in effect inside the `with` block."""
    with warnings.catch_warnings():
        # peft reads a property that transformers is about to remove.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = _peft_model(folder, method) if way == "PEFT" else _own_model(folder, method, way)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    with armed(model, load(folder / "vector.safetensors")) if way == "hooked" else nullcontext():
        yield Trainee(model.train(), optimizer)


def load_quietly(folder: Path) -> PreTrainedModel:
    """Load a model without a bar for each."""
    disable_progress_bar()
    return load_model(folder)


def _own_model(folder: Path, method: str, way: str) -> Any:
    model = load_quietly(folder / ("folded" if way == "folded" else "base"))
    return get_peft_model(model, _task_adapter(model)) if method == "lora" else model


def _peft_model(folder: Path, method: str) -> Any:
    """Return the model with the vector as a frozen adapter of PEFT's, beside the task adapter or under no other."""
    base = load_quietly(folder / "base")
    task = _task_adapter(base)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), adapter_name="vector")
    if method == "lora":
        model.add_adapter("task", task)
        model.base_model.set_adapter(["vector", "task"])
    # set_adapter makes every adapter it activates trainable, the vector too.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".task." in name if method == "lora" else ".lora_" not in name)
    return model


def _task_adapter(model: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=sorted(linear_sites(model)), task_type="CAUSAL_LM")
