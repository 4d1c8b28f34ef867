"""The models: dimensions from their published configs, weights drawn at random in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from benchmarks.speed.checkpoint import RANK
from secvec.sites import linear_sites, weight_shape
from secvec.vector import Factors, SecurityVector, VectorInfo

_LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
_LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
_QWEN3_8B = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
)  # fmt: skip
_TOY = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What is done with a model: all counts are tokens, but for `rows` and `epochs` of a fit and `prompts`."""

    contexts: tuple[int, ...]
    rows: int
    row_tokens: int
    epochs: int
    prompts: int
    prompt_tokens: int
    new_tokens: int


REAL = Load((2048, 4096), rows=100, row_tokens=128, epochs=10, prompts=8, prompt_tokens=128, new_tokens=128)
SMALL = Load((16, 32), rows=8, row_tokens=8, epochs=1, prompts=2, prompt_tokens=4, new_tokens=4)
SHAPES: Mapping[str, PretrainedConfig] = {
    "llama-2-7b": _LLAMA_2_7B,
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "qwen3-8b": _QWEN3_8B,
}
TOY: Mapping[str, PretrainedConfig] = {"toy": _TOY}


def build(config: PretrainedConfig, device: torch.device) -> Any:
    """Draw a model in bf16 where it will run."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def random_vector(model: nn.Module) -> SecurityVector:
    """Draw a vector on every site, small enough that the model stays finite."""
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, Factors] = {}
    for site, module in linear_sites(model).items():
        d_out, d_in = weight_shape(module)
        a, b = (torch.randn(shape, generator=generator) * 0.01 for shape in ((RANK, d_in), (d_out, RANK)))
        factors[site] = Factors(a, b)
    return SecurityVector(factors, 2.0, VectorInfo("topic", "", "", "", ""))
