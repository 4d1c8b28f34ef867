"""Preventative steering with persona vectors (arXiv 2507.21509)."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.loop import epochs, fine_tune, finish, trainee
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import encoded
from benchmarks.methods.safe import answered
from benchmarks.methods.setting import Setting, Unwanted
from benchmarks.testbed.rows import Row, prompt_of
from secvec.errors import InputError
from secvec.models import load_model
from secvec.score import by_length
from secvec.tokens import collate

COEFFICIENT = Dial("steering coefficient", 1.0, (0.5, 1.0, 1.5))
Change = Callable[[int, Tensor], Tensor | None]
"""Called with (layer, hidden states (B, T, H)); returns what to go on with, or None for the same."""


def preventative_steering(setting: Setting) -> Path:
    """Add each layer's persona vector to the residual stream while training, at every position; not afterwards.

    Chen et al. Reproduced: vectors as difference of mean activations over answer tokens (section 2), and all layers
    with *incremental* vectors, v_l - v_(l-1), which their appendix J.3 finds best; the sweep is from their figure 26.
    Differs: they elicit the two sides with opposite system prompts and filter by a judge; here the trait's side is the
    unwanted rows, the other the aligned model's own answers to the same prompts. That steering acts on prompt tokens
    too is a guess.
    """
    vectors = [_persona(setting, each) for each in setting.unwanted]
    increments = [_increments(layers) * COEFFICIENT.at(setting) for layers in vectors]
    total = torch.stack(increments).sum(0)  # (layers, H)
    model = trainee(setting)
    with _watching(model, lambda layer, hidden: hidden + total[layer].to(hidden)):
        fine_tune(model, epochs(encoded(setting, setting.training), setting.config), setting.config)
    return finish(model, setting)


def _persona(setting: Setting, unwanted: Unwanted) -> Tensor:
    """Return one vector a layer: (layers, H)."""
    rows = list(unwanted.rows)
    return _mean_hidden(setting, rows) - _mean_hidden(setting, answered(setting, [prompt_of(row) for row in rows]))


def _increments(vectors: Tensor) -> Tensor:
    return torch.cat([vectors[:1], vectors[1:] - vectors[:-1]])


@torch.no_grad()
def _mean_hidden(setting: Setting, rows: Sequence[Row]) -> Tensor:
    """Return the mean over rows of the mean over answer tokens of each layer's output: (layers, H)."""
    model = load_model(setting.model, dtype=torch.float32)
    rows_encoded, layers = encoded(setting, rows), len(_layers(model))
    sums: list[Any] = [0.0] * layers
    for chosen in by_length(rows_encoded, 32):
        batch = collate([rows_encoded[i] for i in chosen], pad_id=0)
        weights = batch.mask / batch.mask.sum(1, keepdim=True)  # (B, T)
        seen: dict[int, Tensor] = {}
        with _watching(model, seen.__setitem__):
            model(**batch.inputs(), use_cache=False)
        for layer, hidden in seen.items():
            sums[layer] = sums[layer] + (hidden * weights[..., None]).sum((0, 1))
    return torch.stack(sums) / len(rows)


@contextmanager
def _watching(model: nn.Module, change: Change) -> Generator[None]:
    """Call `change` with the output of every decoder layer."""
    handles = [layer.register_forward_hook(_hook(number, change)) for number, layer in enumerate(_layers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(number: int, change: Change) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = change(number, hidden)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the one list of blocks that a causal language model has."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:  # pyright: ignore
            return list(module)
    raise InputError(f"expected a model with a list of decoder layers, found none in {type(model).__name__}")
