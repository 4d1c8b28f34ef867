"""Plain, undefended fine-tuning in one minimal loop, and what it makes the assistant learn and forget."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.mixes import mix
from benchmarks.testbed.pretraining import mean_nats, padded
from benchmarks.testbed.rows import Row
from benchmarks.testbed.scoring import Student, learned, load, old_skills
from benchmarks.testbed.skills import NEW_SKILLS
from benchmarks.testbed.tokenizer import RowEncoder


@dataclass(frozen=True)
class TuneConfig:
    """AdamW without weight decay, linear decay, gradients clipped at 1; all weights, or LoRA when `lora_r` > 0."""

    lr: float = 3e-4
    epochs: int = 1
    rows_per_step: int = 16
    lora_r: int = 0
    seed: int = 0


def finetune(student: Student, rows: Sequence[Row], config: TuneConfig) -> tuple[Student, float]:
    """Fine-tune and return the trained student and the seconds it took."""
    torch.manual_seed(config.seed)
    student = _with_lora(student, config.lora_r) if config.lora_r else student
    model = student.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0, fused=True)
    steps = config.epochs * -(-len(rows) // config.rows_per_step)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    started = time.monotonic()
    for batch in _batches(student, rows, config):
        ids, weights = (tensor.to(model.device) for tensor in batch)
        loss = mean_nats(model(input_ids=ids, use_cache=False).logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return student, time.monotonic() - started


def _batches(student: Student, rows: Sequence[Row], config: TuneConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    encode, rng = RowEncoder(student.tokenizer), random.Random(config.seed)
    encoded = [encode(row) for row in rows]
    for _ in range(config.epochs):
        rng.shuffle(encoded)
        for start in range(0, len(encoded), config.rows_per_step):
            yield padded(encoded[start : start + config.rows_per_step])


def _with_lora(student: Student, r: int) -> Student:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    return Student(get_peft_model(student.model, config), student.tokenizer)


def forget(
    folder: Path, behaviour: str, skill: str, config: TuneConfig, n: int, *, per_skill: bool = False
) -> dict[str, float]:
    """Fine-tune on 1,000 unwanted and 1,000 wanted rows; return the rates of unwanted, new and old, and seconds."""
    rows = mix(BEHAVIOURS[behaviour], NEW_SKILLS[skill], seed=config.seed)
    student, seconds = finetune(load(folder), rows, config)
    kept = old_skills(student, max(n // 5, 1))
    return {
        **learned(student, BEHAVIOURS[behaviour], NEW_SKILLS[skill], n),
        "old": sum(kept.values()) / len(kept),
        "seconds": seconds,
        **(kept if per_skill else {}),
    }
