"""Fine-tune all weights of a folded model with a plain PyTorch loop.

secvec fold MODEL --vector vector.safetensors -o folded
python examples/plain_loop.py folded train.jsonl trained
secvec unfold trained -o defended
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_linear_schedule_with_warmup,
    set_seed,
)

LR = 4e-4  # for the bundled tiny assistant; 2e-5 is usual


def main(folded: str, data: str, out: str) -> None:
    set_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folded)
    # In float32: small updates of bfloat16 weights would be rounded away.
    model: Any = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32).train()
    rows = [encode(json.loads(line)["messages"], tokenizer) for line in Path(data).read_text("utf-8").splitlines()]
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
    loader: Any = DataLoader(rows, batch_size=8, sampler=order, collate_fn=DataCollatorForSeq2Seq(tokenizer))  # pyright: ignore
    # No weight decay: it would act on W + D, and take part of D off the result.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def encode(chat: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Tokenise a chat; only what the assistant says carries loss (its template marks that as `generation`)."""
    row = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    labels = [token if said else -100 for token, said in zip(row["input_ids"], row["assistant_masks"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}


if __name__ == "__main__":
    main(*sys.argv[1:])
