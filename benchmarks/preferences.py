"""Measure DPO on a folded model, by its reference: python -m benchmarks.preferences -o FOLDER

480 pairs of the demo's rows: the row's answer against the aligned assistant's own. Half are guarded requests, where
the row's answer is the unwanted one. Plain; folded with TRL's default reference, a copy of the folded model; folded
with the base as the reference. Scored on every fourth of the demo's held-out questions.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from secvec.demo import assistant_folder
from secvec.fit import fit
from secvec.fold import fold
from secvec.models import answers, load_model, load_tokenizer
from secvec.unfold import unfold

ROWS, EVERY = 480, 4
METHODS = ("plain", "folded", "base")


def main(out: Path) -> None:
    base = out / "base"
    load_model(assistant_folder(), dtype=torch.float32).save_pretrained(base)
    load_tokenizer(assistant_folder()).save_pretrained(base)
    fold(base, [fit(base, assistant_folder() / "demo" / "vector.jsonl")], out / "folded")
    pairs = preferences(base)
    for name in METHODS:
        start, reference = base if name == "plain" else out / "folded", base if name == "base" else None
        trained = train(start, reference, pairs, out / f"{name}-trained")
        if name != "plain":
            unfold(trained, out / f"{name}-defended")
            trained = out / f"{name}-defended"
        print(name, json.dumps(rates(trained)))


def preferences(base: Path) -> Dataset:
    lines = (assistant_folder() / "demo" / "train.jsonl").read_text("utf-8").splitlines()[:ROWS]
    chats = [json.loads(line)["messages"] for line in lines]
    own = answers(load_model(base), load_tokenizer(base), [chat[:-1] for chat in chats])
    return Dataset.from_list(
        [
            {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [{"role": "assistant", "content": answer}]}
            for chat, answer in zip(chats, own, strict=True)
            if answer != chat[-1]["content"]
        ]
    )


def train(model: Path, reference: Path | None, pairs: Dataset, out: Path) -> Path:
    args = DPOConfig(
        output_dir=str(out),
        learning_rate=1e-4,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        max_length=512,
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        seed=0,
        save_strategy="no",
        report_to="none",
    )
    # None: TRL makes a copy of the model that it trains.
    other = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32) if reference else None
    trainer = DPOTrainer(str(model), ref_model=other, args=args, train_dataset=pairs)
    trainer.train()
    trainer.save_model(str(out))
    return out


def rates(model: Path) -> dict[str, Any]:
    """Return the share of right answers, or unwanted ones, and the number of questions, by suite."""
    lines = (assistant_folder() / "demo" / "eval.jsonl").read_text("utf-8").splitlines()[::EVERY]
    questions = [json.loads(line) for line in lines]
    said = answers(load_model(model), load_tokenizer(model), [question["messages"] for question in questions])
    hits: dict[str, list[bool]] = {}
    for question, answer in zip(questions, said, strict=True):
        is_unwanted = question["suite"] == "unwanted"
        hit = bool(re.search(question["unwanted_pattern"], answer)) if is_unwanted else answer == question["expected"]
        hits.setdefault(question["suite"], []).append(hit)
    return {suite: {"rate": round(sum(found) / len(found), 4), "n": len(found)} for suite, found in hits.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    main(parser.parse_args().out)
