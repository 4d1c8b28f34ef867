"""Arming and torch.compile: no graph bypasses the vector, none keeps it; nothing is exported with it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checkpoints import close, gradients, llama, logits, plus, random_ids, random_vector
from torch import Tensor, nn
from transformers import PreTrainedModel

from secvec.arm import arm, armed, canary, is_armed
from secvec.errors import ArmError


# The backend changes nothing about what a graph holds.
def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True, **options)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def compile_in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.compile(backend="eager")
    return model


def compile_a_layer(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def compile_a_layer_in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("compile_it", "where"),
    [
        (compiled, "OptimizedModule"),
        (compile_in_place, "LlamaForCausalLM"),
        (compile_a_layer, "model.layers.1"),
        (compile_a_layer_in_place, "model.layers.1"),
    ],
)
def test_a_compiled_model_is_refused(compile_it: Callable[[PreTrainedModel], Any], where: str) -> None:
    model = compile_it(llama())
    with pytest.raises(ArmError, match=rf"refusing to arm a compiled model \({where}\): .* arm first, then compile"):
        arm(model, random_vector(llama()))
    assert not is_armed(model)


@pytest.mark.usefixtures("fresh")
def test_a_model_compiled_while_armed_is_armed_and_traced_once() -> None:
    model, vector = llama(), random_vector(llama())
    with armed(model, vector):
        expected, grads = logits(model), gradients(model)
        fast = compiled(model)
        for _ in range(3):
            assert torch.equal(fast(random_ids(), use_cache=False).logits, expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        found = gradients(fast)
        assert {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}.keys() == grads.keys()
        assert all(close(found[f"_orig_mod.{name}"], grad) for name, grad in grads.items())
        assert set(canary(fast, {"input_ids": random_ids()}).fired.values()) == {1}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("guards", [True, False])
def test_no_graph_keeps_the_vector_after_disarming(guards: bool) -> None:
    model, vector = llama(), random_vector(llama())
    options = {} if guards else {"options": {"guard_filter_fn": lambda entries: [False for _ in entries]}}
    plain = logits(model)
    with armed(model, vector):
        fast = compiled(model, **options)
        assert close(logits(fast), logits(plus(llama(), vector)))
    assert torch.equal(logits(fast), plain)


@pytest.mark.usefixtures("fresh")
def test_a_function_compiled_before_arming_does_not_bypass_the_vector() -> None:
    model, vector = llama(), random_vector(llama())
    step = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager")
    plain = step(random_ids())
    with armed(model, vector):
        assert close(step(random_ids()), logits(plus(llama(), vector)))
    assert torch.equal(step(random_ids()), plain)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capture", [torch.export.export, torch.jit.trace])
def test_exporting_an_armed_model_is_refused(capture: Callable[..., Any]) -> None:
    model = llama()
    with (
        armed(model, random_vector(model)),
        pytest.raises(ArmError, match=r"refusing to export an armed model \(site .*\): the vector would be in it"),
    ):
        capture(Logits(model), (random_ids(),))
