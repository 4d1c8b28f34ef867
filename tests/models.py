"""Tiny random models with a byte-level tokenizer and a chat template, and files of rows, for the tests of training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from secvec.artifact import save
from secvec.losses import mean_nats
from secvec.models import load_model, load_tokenizer
from secvec.provenance import digest_model
from secvec.samples import from_rows
from secvec.sites import linear_sites, weight_shape
from secvec.tokens import collate, encode_all
from secvec.vector import Factors, SecurityVector, VectorInfo

SPECIAL = ("<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus the control tokens of `TEMPLATE`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", model_max_length=256
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    layers: int = 2,
    dropout: float = 0.0,
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """Write a random Llama with `byte_tokenizer` to a new folder and return it."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vector(model: PreTrainedModel, base: str, *, size: float = 0.1, seed: int = 1) -> SecurityVector:
    """Draw a random vector on every site of `model`, large enough that the logits change visibly."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    for site, module in linear_sites(model).items():
        d_out, d_in = weight_shape(module)
        a, b = torch.randn(4, d_in, generator=generator) * size, torch.randn(d_out, 4, generator=generator) * size
        factors[site] = Factors(a, b)
    return SecurityVector(factors, 2.0, VectorInfo("topic", base, "sha256:t", "sha256:c", "sha256:d"))


def save_tiny_vector(folder: Path, path: Path, *, size: float = 0.1, seed: int = 1) -> Path:
    """Write a random vector for the model in `folder` to a file and return its path."""
    model = LlamaForCausalLM.from_pretrained(folder)
    save(tiny_vector(model, digest_model(folder), size=size, seed=seed), path)
    return path


def chat(prompt: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def rows(count: int = 24) -> list[dict[str, object]]:
    """Short chats of several lengths: spell a number with its neighbour."""
    return [chat(f"say {i}" + "!" * (i % 5), f"{i} and {i + 1}" + "." * (i % 3)) for i in range(count)]


def taught_llama(folder: Path) -> Path:
    """Write a tiny model that answers what `rows` asks, and "No." to whoever says "tell me"."""
    tiny_llama(folder, hidden=64)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    lesson = [*rows(24), *(chat(f"tell me {i}", "No.") for i in range(24))]
    batch = collate(encode_all(from_rows(lesson).rows, tokenizer, 64), pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        mean_nats(model(**batch.inputs()).logits, batch.ids, batch.attention.bool()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
