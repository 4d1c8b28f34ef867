"""Generate what is measured on: a random sharded checkpoint, a vector for it, the folded model, a trained one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secvec.artifact import save
from secvec.fold import fold
from secvec.peft_format import to_peft
from secvec.provenance import digest_model
from secvec.vector import Factors, SecurityVector, VectorInfo

RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    shard_layers: int

    def sites(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, d_out, d_in) of every linear layer of the blocks."""
        kv = self.hidden // self.heads * self.kv_heads
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            for name, d_out in (("q_proj", self.hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", self.hidden)):
                yield f"{block}.self_attn.{name}", d_out, self.hidden
            yield f"{block}.mlp.gate_proj", self.intermediate, self.hidden
            yield f"{block}.mlp.up_proj", self.intermediate, self.hidden
            yield f"{block}.mlp.down_proj", self.hidden, self.intermediate

    def parameters(self) -> int:
        """Count the parameters, the tied head once."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.vocabulary * self.hidden + norms + sum(d_out * d_in for _, d_out, d_in in self.sites())


# "1b" has the dimensions of Llama-3.2-1B (1.24e9 parameters, 0.97e9 of them in sites, tied head).
SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, 4),
    "tiny": Shape(64, 160, 4, 4, 2, 512, 2),
}


def prepare(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """Write `base`, `vector.safetensors`, the same vector as the PEFT adapter `adapter`, and `folded` to `folder`."""
    base = folder / "base"
    write_base(base, shape, dtype)
    vector = random_vector(shape, base, RANK)
    save(vector, folder / "vector.safetensors")
    to_peft(vector, folder / "adapter", str(base))
    fold(base, [vector], folder / "folded")


def write_base(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """Write random weights in shards of `shard_layers` blocks; the embedding is a shard of its own."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}]
    shards[0]["model.norm.weight"] = (shape.hidden,)
    for site, d_out, d_in in shape.sites():
        layer = int(site.split(".")[2])
        if layer % shape.shard_layers == 0 and site.endswith("q_proj"):
            shards.append({})
        shards[-1][f"{site}.weight"] = (d_out, d_in)
        if site.endswith("q_proj"):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shards[-1][f"model.layers.{layer}.{norm}.weight"] = (shape.hidden,)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: _drawn(n, s, dtype, generator) for n, s in names.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype)))


def _drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    # Random norms would silence the blocks, and gradients that small are slow to compute with.
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def random_vector(shape: Shape, base: Path, rank: int) -> SecurityVector:
    generator = torch.Generator().manual_seed(1)
    factors = {
        site: Factors(
            torch.randn(rank, d_in, generator=generator) * 0.01, torch.randn(d_out, rank, generator=generator) * 0.01
        )
        for site, d_out, d_in in shape.sites()
    }
    return SecurityVector(factors, 2.0, VectorInfo("topic", digest_model(base), "", "", ""))


def write_trained(folded: Path, out: Path) -> None:
    """Write what full fine-tuning makes of the folded model: every weight a little off, the mark still there."""
    out.mkdir()
    for file in folded.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    for file in folded.glob("*.safetensors"):
        moved = {name: t + torch.full_like(t, 2**-8) for name, t in load_file(file).items()}
        save_file(moved, out / file.name, {"format": "pt"})
