"""A hook, a fold on disk, PEFT's LoRA and float64 mathematics are the same model, and train to the same model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ARCHITECTURES, plus, random_ids, random_vector, save_model, tiny, weight_files
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from secvec.arm import armed
from secvec.errors import SiteError
from secvec.fold import fold
from secvec.peft_format import to_peft
from secvec.provenance import digest_model
from secvec.sites import canonical
from secvec.unfold import unfold
from secvec.vector import Factors, SecurityVector

# peft reads a property that transformers is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Float64(TorchFunctionMode):
    """Models compute norms, softmax and rotary angles in float32 whatever their dtype; here they do it in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        named = {name: self._wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._wide, args), **named)

    @staticmethod
    def _wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value


MODES: dict[torch.dtype, Callable[[], AbstractContextManager[Any]]] = {
    torch.float64: Float64,
    torch.float32: nullcontext,
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
Tensors = Mapping[str, Tensor]


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    # The faster experts know no float64.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model.eval()


def prepared(tmp_path: Path, architecture: str, dtype: torch.dtype) -> tuple[Path, SecurityVector]:
    model = tiny(architecture, dtype=dtype)
    base = save_model(model, tmp_path / "base")
    return base, random_vector(model, base=digest_model(base))


def loss_of(model: nn.Module, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    ids = random_ids(seed=seed)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


def gradients(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradients of a loss for every parameter of the base model, in float64."""
    base = {canonical(n).replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    for parameter in base.values():
        parameter.requires_grad_(True)
    with MODES[dtype]():
        loss, logits = loss_of(model)
        loss.backward()
    return logits.detach().double(), {name: p.grad.double() for name, p in base.items() if p.grad is not None}


def distance(found: Tensors, expected: Tensors) -> float:
    """Return ||found - expected|| / ||expected|| over all tensors together."""
    assert found.keys() == expected.keys()
    squares = [(float((found[n] - e).square().sum()), float(e.square().sum())) for n, e in expected.items()]
    different, whole = map(sum, zip(*squares, strict=True))
    return (different / whole) ** 0.5


def forms(base: Path, vector: SecurityVector, dtype: torch.dtype, tmp_path: Path) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model with the vector in effect, each way in turn."""
    hooked = load(base, dtype)
    with armed(hooked, vector):
        yield "hook", hooked
    fold(base, [vector], tmp_path / "folded")
    yield "fold", load(tmp_path / "folded", dtype)
    to_peft(vector, tmp_path / "peft", str(base))
    yield "peft", PeftModel.from_pretrained(load(base, dtype), str(tmp_path / "peft")).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hook_fold_peft_and_mathematics_agree(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    base, vector = prepared(tmp_path, architecture, dtype)
    plain, _ = gradients(load(base, torch.float64), torch.float64)
    logits, grads = gradients(plus(load(base, torch.float64), vector), torch.float64)
    assert distance({"": plain}, {"": logits}) > 0.1
    assert set(grads) >= {f"{site}.weight" for site in vector.sites}
    for form, model in forms(base, vector, dtype, tmp_path):
        found, found_grads = gradients(model, dtype)
        assert distance({"": found}, {"": logits}) < TOLERANCE[dtype], form
        assert distance(found_grads, grads) < TOLERANCE[dtype], form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_saving_and_unfolding_returns_every_byte(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    base, vector = prepared(tmp_path, architecture, dtype)
    fold(base, [vector], tmp_path / "folded")
    load(tmp_path / "folded", dtype).save_pretrained(tmp_path / "trained")
    report = unfold(tmp_path / "trained", tmp_path / "back")
    assert (report.sites, report.sites_changed) == (len(vector.sites), 0)
    assert weight_files(tmp_path / "back") == weight_files(base)


def five_steps(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for seed in range(5):
        with MODES[dtype]():
            loss_of(model, seed=seed)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def matrices(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parameters to compare: in float32 no biases, as those of the attention keys train on rounding alone.

    Softmax does not feel them, so their gradient is zero; Adam makes whole steps of what rounding leaves of it.
    """
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    return {n: p for n, p in parameters.items() if dtype == torch.float64 or not n.endswith("bias")}


STEPS = [(a, torch.float32, 1e-6) for a in ARCHITECTURES] + [
    (a, torch.float64, 1e-13) for a in ("llama", "gpt2", "opt", "mixtral")
]


@pytest.mark.parametrize(("architecture", "dtype", "tolerance"), STEPS)
def test_training_folded_then_unfolded_is_training_armed_by_hooks(
    tmp_path: Path, architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    base, vector = prepared(tmp_path, architecture, dtype)
    hooked = load(base, dtype)
    with armed(hooked, vector):
        five_steps(hooked, dtype)
    fold(base, [vector], tmp_path / "folded")
    five_steps(load(tmp_path / "folded", dtype), dtype).save_pretrained(tmp_path / "trained")
    report = unfold(tmp_path / "trained", tmp_path / "out")
    assert report.sites_changed == report.sites
    expected = matrices(hooked, dtype)
    assert distance(matrices(load(tmp_path / "out", dtype), dtype), expected) < tolerance
    assert distance(matrices(load(base, dtype), dtype), expected) > 1e-3


# What an expert's two halves of `gate_up_proj`, and its `down_proj`, are on disk.
EXPERT = {
    "mixtral": [f"model.layers.1.block_sparse_moe.experts.2.{name}" for name in ("w1", "w3", "w2")],
    "qwen3_moe": [f"model.layers.1.mlp.experts.2.{name}_proj" for name in ("gate", "up", "down")],
}


@pytest.mark.parametrize("architecture", EXPERT)
def test_experts_are_folded_one_by_one_by_their_names_on_disk(tmp_path: Path, architecture: str) -> None:
    base, vector = prepared(tmp_path, architecture, torch.float64)
    expected = load(base, torch.float64)
    experts = expected.get_submodule("model.layers.1.mlp.experts")
    fused = {name: experts.get_parameter(name).data[2] for name in ("gate_up_proj", "down_proj")}
    weights = [*fused["gate_up_proj"].chunk(2), fused["down_proj"]]
    on_disk = dict(zip(EXPERT[architecture], weights, strict=True))
    factors = {s: Factors(torch.randn(3, w.shape[1]), torch.randn(w.shape[0], 3)) for s, w in on_disk.items()}
    vector = replace(vector, factors={**vector.factors, **factors})
    for site, weight in on_disk.items():
        weight += vector.delta(site)
    expected = plus(expected, vector)
    fold(base, [vector], tmp_path / "folded")
    folded = load(tmp_path / "folded", torch.float64)
    assert distance(matrices(folded, torch.float64), matrices(expected, torch.float64)) < 1e-12
    assert distance(matrices(folded, torch.float64), matrices(load(base, torch.float64), torch.float64)) > 1e-2
    folded.save_pretrained(tmp_path / "trained")
    assert unfold(tmp_path / "trained", tmp_path / "back").sites == len(vector.sites)
    assert weight_files(tmp_path / "back") == weight_files(base)
    with pytest.raises(SiteError, match="expert by expert, a vector can be folded, not armed"), armed(folded, vector):
        pass
