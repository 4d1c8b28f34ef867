"""Tiny random checkpoints on disk and random vectors for them, for the tests of files and folders."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from secvec.sites import linear_sites, weight_shape
from secvec.vector import Factors, SecurityVector, VectorInfo

# These tensors are so small that threads would only wait for each other.
torch.set_num_threads(1)

INFO = VectorInfo("topic", "sha256:base", "sha256:tok", "sha256:chat", "sha256:data", {"epochs": 3, "lr": 1e-3})


def llama(*, dtype: torch.dtype = torch.float32, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=160, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = SPECIAL | {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
# The models that equivalence is shown on: model_type -> what its config sets besides the defaults.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "qwen3": GROUPED,
    "mistral": GROUPED,
    "gemma": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "gemma3": {"text_config": GROUPED, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 150},
    "gpt2": {"vocab_size": 160, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | SPECIAL,
    "gpt_neox": SMALL,
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": SMALL,
    "phi3": SMALL | {"num_key_value_heads": 2},
    "mixtral": GROUPED | {"num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen2_moe": SMALL | EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 16},
    "qwen3_moe": GROUPED | EXPERTS,
}


def tiny(architecture: str, *, dtype: torch.dtype = torch.float32, **changed: Any) -> PreTrainedModel:
    """Make a random model of one of `ARCHITECTURES`, with some settings changed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | changed)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def save_model(model: PreTrainedModel, folder: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="8KB" if shards else "1GB")
    return folder


def random_vector(model: PreTrainedModel, *, base: str = INFO.base, rank: int = 4, seed: int = 1) -> SecurityVector:
    """Draw factors for every site of the model, large enough that the logits change visibly."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    for site, module in linear_sites(model).items():
        d_out, d_in = weight_shape(module)
        a = torch.randn(rank, d_in, generator=generator) * 0.1
        factors[site] = Factors(a, torch.randn(d_out, rank, generator=generator) * 0.1)
    info = VectorInfo(INFO.kind, base, INFO.tokenizer, INFO.chat_template, INFO.data, INFO.fit)
    return SecurityVector(factors, 2.0, info)


def random_ids(*, rows: int = 2, length: int = 12, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(seed))


def plus(model: PreTrainedModel, *vectors: SecurityVector) -> PreTrainedModel:
    """W + D in float64: the mathematics that everything is compared with."""
    model = model.double()
    for site, module in linear_sites(model).items():
        for vector in vectors:
            if site in vector.factors:
                module.weight.data += vector.delta(site).T if isinstance(module, Conv1D) else vector.delta(site)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids()).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def flip(path: Path, position: int) -> None:
    """Change one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a language model's loss on `random_ids`, by parameter."""
    model.zero_grad()
    model(input_ids=random_ids(), labels=random_ids(), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Tell whether ||found - expected|| < tolerance * ||expected||."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) < tolerance * float(expected.norm())
