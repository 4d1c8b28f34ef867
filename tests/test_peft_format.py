import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INFO, gpt2, llama, logits, plus, random_vector, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from secvec.errors import ArtifactError
from secvec.peft_format import from_peft, to_peft
from secvec.provenance import digest_model
from secvec.vector import Factors, SecurityVector

# peft reads a property that transformers is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def peft_logits(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(model.double(), folder, autocast_adapter_dtype=False).eval())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_peft_loads_what_we_write_with_the_same_effect(tmp_path: Path, make: Any) -> None:
    base = save_model(make(), tmp_path / "base")
    vector = random_vector(make(), rank=4)
    site = vector.sites[0]
    odd = Factors(*(t[..., :3] if t is vector.factors[site].b else t[:3] for t in vars(vector.factors[site]).values()))
    vector = SecurityVector({**vector.factors, site: odd}, 1.25, INFO)
    to_peft(vector, tmp_path / "adapter", str(base))
    expected = logits(plus(make(), vector))
    torch.testing.assert_close(peft_logits(make(), tmp_path / "adapter"), expected, rtol=1e-12, atol=1e-12)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()} == {0o600}

    back = from_peft(tmp_path / "adapter", info=vector.info)
    assert back.scale == vector.scale
    for site in vector.sites:
        assert torch.equal(back.factors[site].a, vector.factors[site].a)
        assert torch.equal(back.factors[site].b, vector.factors[site].b)


def peft_folder(tmp_path: Path, model: PreTrainedModel, **options: Any) -> Path:
    """Save an adapter by real PEFT with factors that are not zero."""
    base = save_model(model, tmp_path / "base")
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options))
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


MLP = ["up_proj", "down_proj", "q_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": MLP},
        {"target_modules": MLP, "use_rslora": True},
        {"target_modules": MLP, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 16}},
    ],
)
def test_we_read_what_peft_writes_with_the_same_effect(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = peft_folder(tmp_path, llama(), **options)
    vector = from_peft(folder)
    assert vector.info.base == digest_model(tmp_path / "base")
    expected = logits(plus(llama(), vector))
    torch.testing.assert_close(peft_logits(llama(), folder), expected, rtol=1e-7, atol=1e-7)


def test_we_read_an_adapter_on_conv1d(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    expected = logits(plus(gpt2(), from_peft(folder)))
    torch.testing.assert_close(peft_logits(gpt2(), folder), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": [*MLP, "lm_head"]}, "found tensor base_model.model.lm_head.base_layer"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_more_than_lora_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = peft_folder(tmp_path, llama(), **({"target_modules": MLP} | options))
    with pytest.raises(ArtifactError, match=message):
        from_peft(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"r": 8}, "has rank 4"),
        ({"base_model_name_or_path": "some/hub-id"}, "pass info="),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = peft_folder(tmp_path, llama(), target_modules=MLP)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        from_peft(folder)


def test_stray_and_lone_tensors_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, llama(), target_modules=MLP)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    site = "base_model.model.model.layers.0.mlp.up_proj"
    save_file(tensors | {f"{site}.weight": torch.zeros(1, 1)}, path)
    with pytest.raises(ArtifactError, match=f"tensor {site}.weight"):
        from_peft(folder)
    save_file({name: t for name, t in tensors.items() if name != f"{site}.lora_A.weight"}, path)
    with pytest.raises(ArtifactError, match="only factor B of site"):
        from_peft(folder)
