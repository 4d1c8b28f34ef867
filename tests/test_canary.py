"""The canary, and what `armed` refuses at the end: parts of the model that ran without the vector."""

from dataclasses import replace

import pytest
import torch
from checkpoints import gradients, llama, logits, random_ids, random_vector, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from secvec.arm import arm, armed, canary, disarm, is_armed
from secvec.errors import ArmError
from secvec.vector import Factors, SecurityVector

SITE = "model.layers.1.mlp.down_proj"


def batch() -> dict[str, Tensor]:
    return {"input_ids": random_ids()}


def zeroed(vector: SecurityVector) -> SecurityVector:
    return replace(vector, factors={s: Factors(f.a, torch.zeros_like(f.b)) for s, f in vector.factors.items()})


def bypass(model: PreTrainedModel) -> None:
    """Compute with the weight of `SITE` and not through the layer, as fused kernels do."""
    block = model.get_submodule(SITE.removesuffix(".down_proj"))
    weight = block.down_proj.weight
    block.forward = lambda x: nn.functional.linear(block.act_fn(block.gate_proj(x)) * block.up_proj(x), weight)


def test_the_canary_shows_every_site_acting() -> None:
    model, vector = llama(), random_vector(llama())
    arm(model, vector)
    shown = canary(model, batch())
    assert shown.fired == dict.fromkeys(vector.sites, 1)
    difference = (logits(model).double() - logits(llama()).double()).abs().max()
    assert shown.largest_change == pytest.approx(float(difference), rel=1e-5)
    assert is_armed(model)


def test_the_canary_leaves_each_module_in_its_mode() -> None:
    model, vector = llama().train(), random_vector(llama())
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with armed(model, vector):
        canary(model, batch())
    assert [module.training for module in model.modules()] == modes


def test_the_canary_detects_a_bypassed_layer() -> None:
    model = llama()
    arm(model, random_vector(model))
    bypass(model)
    with pytest.raises(ArmError, match=rf"1 of 14 sites did not run their vector, first {SITE}: .* fused LoRA kernels"):
        canary(model, batch())
    assert is_armed(model)


def test_the_canary_refuses_an_unarmed_model_and_a_vector_without_effect() -> None:
    model, vector = llama(), random_vector(llama())
    with pytest.raises(ArmError, match="canary: expected an armed model, found no armed site in LlamaForCausalLM"):
        canary(model, batch())
    with (
        armed(model, zeroed(vector)),
        pytest.raises(ArmError, match=r"acted at 14 sites but the logits did not change \(0\.0\)"),
    ):
        canary(model, batch())
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with armed(model, vector), pytest.raises(ArmError, match=r"the logits did not change \(nan\)"):
        canary(model, batch())


def test_the_canary_works_on_a_mixture_of_experts() -> None:
    model = tiny("qwen2_moe")
    with armed(model, vector := random_vector(model)):
        assert canary(model, batch()).fired == dict.fromkeys(vector.sites, 1)


# What the end of the block refuses.


def test_a_site_that_lost_its_vector_is_reported() -> None:
    model = llama()
    with (
        pytest.raises(ArmError, match=rf"1 of 14 sites lost their vector while armed, first {SITE}"),
        armed(model, random_vector(model)),
    ):
        logits(model)
        model.get_submodule(SITE)._forward_hooks.clear()
    assert not is_armed(model)


def test_a_model_disarmed_inside_the_block_is_reported() -> None:
    model = llama()
    with pytest.raises(ArmError, match="14 of 14 sites lost their vector"), armed(model, random_vector(model)):
        disarm(model)


def test_a_site_that_never_acted_is_reported_even_if_the_canary_ran_it() -> None:
    model = llama()
    with (
        pytest.raises(ArmError, match=rf"1 of 14 sites never ran their vector while armed, first {SITE}"),
        armed(model, random_vector(model)),
    ):
        canary(model, batch())
        bypass(model)
        gradients(model)
    assert not is_armed(model)


def test_a_block_in_which_the_model_never_ran_is_fine() -> None:
    model = llama()
    with armed(model, random_vector(model)):
        pass
    assert not is_armed(model)


def test_a_run_in_which_no_site_acted_is_refused() -> None:
    """Fused kernels that bypass every module leave all sites silent: the whole run was then unprotected."""
    model = llama()
    model.forward = lambda **inputs: model.lm_head(model.model.embed_tokens(inputs["input_ids"]))
    with pytest.raises(ArmError, match="14 of 14 sites never ran their vector"), armed(model, random_vector(model)):
        model(input_ids=random_ids())


def test_an_exception_inside_the_block_is_not_masked() -> None:
    model = llama()
    with pytest.raises(KeyError, match="mine"), armed(model, random_vector(model)):
        model.get_submodule(SITE)._forward_hooks.clear()
        raise KeyError("mine")
    assert not is_armed(model)
