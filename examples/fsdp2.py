"""Fine-tune all weights of a folded model with PyTorch's own FSDP2 (`fully_shard`), under torchrun.

secvec fold MODEL --vector vector.safetensors -o folded
torchrun --nproc-per-node 2 examples/fsdp2.py folded train.jsonl trained
secvec unfold trained -o defended

On two machines: torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:PORT ..., on each.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_linear_schedule_with_warmup

LR = 4e-4  # for the bundled tiny assistant; 2e-5 is usual


def main(folded: str, data: str, out: str) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(folded)
    model: Any = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32)
    model.to(device).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # What cannot be sharded is trained whole, in silence: look.
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    rows = [encode(json.loads(line)["messages"], tokenizer) for line in Path(data).read_text("utf-8").splitlines()]
    # The same order in every process; each takes its part of the 8 rows of a step.
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
    loader: Any = DataLoader(rows, batch_size=8, sampler=order, collate_fn=lambda step: step)  # pyright: ignore
    collate = DataCollatorForSeq2Seq(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)  # decay would act on W + D
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    for step in loader:
        tokens = sum(label != -100 for row in step for label in row["labels"])
        batch = collate(step[dist.get_rank() :: dist.get_world_size()]).to(device)
        # A mean over the tokens of all processes, whose gradients FSDP averages.
        loss = model(**batch, num_items_in_batch=tokens).loss * dist.get_world_size()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(out, state_dict=weights)
        tokenizer.save_pretrained(out)
        print(f"{dist.get_world_size()} processes, every parameter a DTensor")
    dist.barrier()
    dist.destroy_process_group()


def encode(chat: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Tokenise a chat; only what the assistant says carries loss (its template marks that as `generation`)."""
    row = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    labels = [token if said else -100 for token, said in zip(row["input_ids"], row["assistant_masks"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}


if __name__ == "__main__":
    main(*sys.argv[1:])
