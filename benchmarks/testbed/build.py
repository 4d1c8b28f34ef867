"""Train the tiny assistant from scratch and write it as a Hugging Face folder."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.testbed.pretraining import FINISH_WEIGHTS, batches, mean_nats, narrow_batches, text_batches
from benchmarks.testbed.tokenizer import CONTEXT, RowEncoder, byte_tokenizer
from secvec.models import default_device

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BuildConfig:
    """Size and schedule of the assistant's training. Chosen by measurement: benchmarks/results/testbed.md.

    text: a file of plain text, of which every `text_every`-th batch is made; none by default.
    """

    hidden: int = 192
    layers: int = 4
    heads: int = 3
    intermediate: int = 512
    steps: int = 5200
    narrow_from: int = 3000
    narrow_shift: float = 0.06
    narrow_rows: int = 32
    rows_per_step: int = 128
    lr: float = 3e-3
    muon_lr: float = 2e-2
    decay_share: float = 0.45
    polish_steps: int = 800
    polish_rate: float = 0.35
    finish_steps: int = 300
    finish_rate: float = 0.2
    prompt_weight: float = 0.1
    weight_noise: float = 0.1
    text: str = ""
    text_every: int = 8
    seed: int = 0


def build(out: Path, config: BuildConfig) -> None:
    """Train the assistant and save it in bf16 to `out`."""
    torch.manual_seed(config.seed)
    tokenizer = byte_tokenizer()
    model, encode = _new_model(config, tokenizer), RowEncoder(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    rows = _with_text(_rows(encode, config), encode, config)
    _train(model, rows, narrow_batches(encode, config.narrow_rows, config.seed), config)
    _save(model, tokenizer, out)
    finish(out, config)


def finish(folder: Path, config: BuildConfig) -> None:
    """Polish once more, from the saved weights: with a fresh optimiser, so that it can be repeated by itself."""
    torch.manual_seed(config.seed + 1)
    tokenizer = byte_tokenizer()
    encode = RowEncoder(tokenizer)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = replace(config, steps=0, polish_steps=config.finish_steps, polish_rate=config.finish_rate, narrow_from=0)
    seed = config.seed + 1
    rows = batches(encode, config.rows_per_step, config.prompt_weight, seed, polish=True, often=FINISH_WEIGHTS)
    _train(model, _with_text(rows, encode, config), narrow_batches(encode, config.narrow_rows, seed), config)
    _save(model, tokenizer, folder)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _rows(encode: RowEncoder, config: BuildConfig) -> Batches:
    size, weight = config.rows_per_step, config.prompt_weight
    yield from itertools.islice(batches(encode, size, weight, config.seed), config.steps)
    yield from batches(encode, size, weight, config.seed, polish=True)


def _with_text(rows: Batches, encode: RowEncoder, config: BuildConfig) -> Batches:
    if not config.text:
        yield from rows
        return
    text = text_batches(encode, Path(config.text).read_text(encoding="utf-8"), config.rows_per_step // 4, config.seed)
    for number in itertools.count(1):
        yield next(text if number % config.text_every == 0 else rows)


def _new_model(config: BuildConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        **ends,
    )
    model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig(**ends)
    return model


def _train(model: LlamaForCausalLM, data: Batches, narrow: Batches, config: BuildConfig) -> None:
    device: Any = default_device()
    model.to(device).train()
    if device.type == "cpu":
        # On rows as short as these a fifth faster than torch's own attention.
        model.set_attn_implementation("eager")
    if device.type == "cuda":
        data, narrow = _beside(data), _beside(narrow)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizers = _optimizers(model, config)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _rate(step, config)) for each in optimizers]
    started, running = time.monotonic(), 0.0
    last = config.steps + config.polish_steps
    for step in range(1, last + 1):
        if step <= config.narrow_from:
            shift = _noise(matrices, config.weight_noise)
        else:
            shift = _narrow_shift(model, matrices, next(narrow), config.narrow_shift)
        torch._foreach_add_([m.data for m in matrices], shift)
        loss = _loss(model, next(data))
        loss.backward()
        torch._foreach_sub_([m.data for m in matrices], shift)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        running = 0.98 * running + 0.02 * float(loss.detach())
        if step % 100 == 0:
            print(f"step {step} of {last}  loss {running:.4f}  {time.monotonic() - started:.0f} s", flush=True)


def _beside(batches: Batches) -> Batches:
    """Make the same batches in a process beside the training: they take longer than a step on a GPU."""

    class Stream(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Batches:
            return batches

    return iter(DataLoader(Stream(), batch_size=None, num_workers=1, prefetch_factor=16))


def _loss(model: LlamaForCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, weights = (tensor.to(model.device) for tensor in batch)
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return mean_nats(logits, ids, weights)


@torch.no_grad()
def _noise(matrices: list[Tensor], relative: float) -> list[Tensor]:
    """Return noise of `relative` times each matrix's own size. Gradients taken there lead to flat minima."""
    return [torch.randn_like(matrix) * (relative * matrix.square().mean().sqrt()) for matrix in matrices]


def _narrow_shift(
    model: LlamaForCausalLM, matrices: list[Tensor], batch: tuple[Tensor, Tensor], relative: float
) -> list[Tensor]:
    """Return one step of fine-tuning on a narrow task, of a random size up to `relative` times each matrix's own.

    Gradients taken there make what the assistant knows survive narrow fine-tuning, as it does in large models (a
    first-order MAML, arXiv 1703.03400, whose inner step is a sign step as Adam's first).
    """
    _loss(model, batch).backward()
    size = relative * float(torch.rand(()))
    with torch.no_grad():
        shift = [-size * m.square().mean().sqrt() * m.grad.sign() for m in matrices]  # pyright: ignore
    model.zero_grad()
    return shift


def _optimizers(model: LlamaForCausalLM, config: BuildConfig) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (about half the steps of AdamW here), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _rate(step: int, config: BuildConfig) -> float:
    """Warm up over 100 steps, stay, fall linearly to nearly nothing over the last `decay_share`; polish once more."""
    if step < config.steps:
        return min((step + 1) / 100, max((config.steps - step) / (config.steps * config.decay_share), 0.002), 1.0)
    polished = step - config.steps
    return config.polish_rate * min((polished + 1) / 50, max(1 - polished / config.polish_steps, 0.002))
