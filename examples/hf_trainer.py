"""Fine-tune all weights of a folded model with the Trainer of transformers, in one process or in several.

secvec fold MODEL --vector vector.safetensors -o folded
python examples/hf_trainer.py folded train.jsonl trained
secvec unfold trained -o defended

With DDP, here on two CPU processes; the 8 rows of a step are shared out, so the result is the same:
accelerate launch --multi_gpu --num_processes 2 examples/hf_trainer.py folded train.jsonl trained
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

LR = 4e-4  # for the bundled tiny assistant; 2e-5 is usual


def main(folded: str, data: str, out: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folded)
    # In float32: small updates of bfloat16 weights would be rounded away.
    model = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32)
    rows = [encode(json.loads(line)["messages"], tokenizer) for line in Path(data).read_text("utf-8").splitlines()]
    args = TrainingArguments(
        output_dir=out,
        learning_rate=LR,
        num_train_epochs=1,
        per_device_train_batch_size=8 // processes,
        weight_decay=0.0,  # it would act on W + D, and take part of D off the result
        seed=0,
        data_seed=0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer: Any = Trainer(model, args, collator, rows, processing_class=tokenizer)  # pyright: ignore[reportArgumentType]
    # Without `use_cpu` the processes would find no GPU and train on their own, in silence.
    assert args.world_size == processes
    trainer.train()
    trainer.save_model(out)
    print(f"{processes} processes: {type(trainer.model_wrapped).__name__}")


def encode(chat: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Tokenise a chat; only what the assistant says carries loss (its template marks that as `generation`)."""
    row = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    labels = [token if said else -100 for token, said in zip(row["input_ids"], row["assistant_masks"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}


if __name__ == "__main__":
    main(*sys.argv[1:])
