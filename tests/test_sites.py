import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import ARCHITECTURES, gpt2, llama, random_vector, save_model, tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secvec.errors import SiteError
from secvec.fold import fold
from secvec.provenance import digest_model
from secvec.sites import canonical, check_site, layer_of, linear_sites, site_modules, weight_shape, without_site
from secvec.vector import Factors

# peft reads a property that transformers is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
GATED = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
NEOX = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
# What is a site in a block of each model. Of mixtures of experts only attention and shared experts are: the experts
# are fused into one three-dimensional parameter, and routers are never sites.
SITES = {
    **dict.fromkeys(
        ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3"], ATTENTION | GATED
    ),
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": NEOX,
    "opt": {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")} | {"fc1", "fc2"},
    "phi": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "mixtral": ATTENTION,
    "qwen2_moe": ATTENTION | {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
    "qwen3_moe": ATTENTION,
}
BLOCK = re.compile(r"(layers|h)\.\d\.")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sites_of_each_architecture(architecture: str) -> None:
    model = tiny(architecture)
    sites = linear_sites(model)
    assert len(sites) == 2 * len(SITES[architecture])
    assert {BLOCK.split(site, maxsplit=1)[-1] for site in sites} == SITES[architecture]
    assert all(model.get_submodule(site) is module for site, module in sites.items())


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NO_SITE = {
    "mixtral": (["mlp.gate", *EXPERTS], 0.86),
    "qwen2_moe": (["mlp.gate", *EXPERTS, "mlp.shared_expert_gate"], 0.58),
    "qwen3_moe": (["mlp.gate", *EXPERTS], 0.67),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_fused_experts_and_routers_are_in_no_site(architecture: str) -> None:
    names, share = without_site(tiny(architecture))
    expected_names, expected_share = NO_SITE.get(architecture, ([], 0.0))
    assert sorted(names) == sorted(expected_names)
    assert share == pytest.approx(expected_share, abs=0.005)


def test_routers_made_of_linear_layers_are_no_sites() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "kv_channels": 8, "intermediate_size": 48, "vocab_size": 160}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **small, **experts))
    routers = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and "router" in n]
    assert len(routers) == 2
    assert list(linear_sites(model)) == ["model.layers.0.self_attention.kv_proj"]


def test_a_vision_tower_has_no_sites() -> None:
    model = tiny("gemma3")
    tower = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and "vision_tower" in n]
    assert tower
    assert all(site.startswith("model.language_model.layers.") for site in linear_sites(model))


def share_a_weight(model: PreTrainedModel) -> None:
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1))
    second.weight = first.weight


def share_a_module(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.mlp").up_proj = model.get_submodule("model.layers.0.mlp.up_proj")


def share_under_another_name(model: PreTrainedModel) -> None:
    for i in (0, 1):
        layer = model.get_submodule(f"model.layers.{i}.mlp.up_proj")
        model.get_submodule(f"model.layers.{i}.mlp").register_parameter("kernel", layer.weight)


@pytest.mark.parametrize("share", [share_a_weight, share_a_module, share_under_another_name])
def test_what_shares_its_weight_is_no_site(share: Callable[[PreTrainedModel], None]) -> None:
    model = llama()
    vector = random_vector(model)
    share(model)
    assert set(vector.sites) - set(linear_sites(model)) == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    with pytest.raises(
        SiteError, match=r"14 sites, of which LlamaForCausalLM lacks 2: model\.layers\.0\.mlp\.up_proj, "
    ):
        site_modules(model, [vector])


@pytest.mark.parametrize(
    "name",
    [
        "module.model.layers.3.mlp.up_proj",
        "base_model.model.model.layers.3.mlp.up_proj.base_layer",
        "module.base_model.model.model.layers.3.mlp.up_proj",
        "_orig_mod.model.layers.3._orig_mod.mlp.up_proj",
        "_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj",
    ],
)
def test_wrappers_leave_no_mark_on_a_name(name: str) -> None:
    assert canonical(name) == "model.layers.3.mlp.up_proj"


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_task_adapter_changes_no_site(make: Callable[[], PreTrainedModel]) -> None:
    sites = linear_sites(make())
    wrapped = get_peft_model(
        make(), LoraConfig(target_modules="all-linear", use_dora=True, fan_in_fan_out=make is gpt2)
    )
    found = linear_sites(wrapped)
    assert list(found) == list(sites)
    assert [weight_shape(module) for module in found.values()] == [weight_shape(module) for module in sites.values()]


def test_shapes_are_d_out_d_in_whichever_way_the_weight_is_stored() -> None:
    assert weight_shape(linear_sites(gpt2())["transformer.h.0.attn.c_attn"]) == (96, 32)
    assert weight_shape(linear_sites(llama())["model.layers.0.mlp.up_proj"]) == (48, 32)
    with pytest.raises(SiteError, match="expected a linear layer as site, found Embedding"):
        weight_shape(llama().get_input_embeddings())


def test_missing_and_misshapen_sites_are_refused() -> None:
    vector = random_vector(llama())
    assert list(site_modules(llama(), [vector])) == list(vector.sites)
    with pytest.raises(SiteError, match=r"GPT2LMHeadModel lacks 14: .*; fit the vector on this model"):
        site_modules(gpt2(), [vector])
    site = "model.layers.1.mlp.down_proj"
    wide = replace(vector, factors={site: Factors(torch.zeros(2, 64), torch.zeros(32, 2))})
    with pytest.raises(
        SiteError, match=rf"{site}: the vector expects a weight of \(32, 64\), the model's is \(32, 48\)"
    ):
        site_modules(llama(), [vector, wide])


def test_the_block_of_a_site() -> None:
    assert layer_of("model.layers.11.mlp.up_proj") == 11
    with pytest.raises(SiteError, match="inside a numbered block, found 'lm_head'"):
        layer_of("lm_head")


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("lm_head", "inside a numbered block"),
        ("model.layers.0.mlp.gate", "that is not a router"),
        ("model.layers.0.mlp.router.layer", "that is not a router"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "of the language model"),
    ],
)
def test_what_can_be_no_site_is_refused_by_name(site: str, reason: str) -> None:
    with pytest.raises(SiteError, match=f"expected a site {reason}, found '{site}'; fit the vector without it"):
        check_site(site)


def test_folding_into_a_router_is_refused_as_arming_is(tmp_path: Path) -> None:
    model = tiny("qwen2_moe")
    base = save_model(model, tmp_path / "base")
    vector = random_vector(model, base=digest_model(base))
    router = {"model.layers.0.mlp.gate": Factors(torch.ones(1, 32), torch.ones(4, 1))}
    with pytest.raises(SiteError, match="not a router"):
        fold(base, [replace(vector, factors=router)], tmp_path / "out")
    with pytest.raises(SiteError, match="lacks 1"):
        site_modules(model, [replace(vector, factors=router)])
