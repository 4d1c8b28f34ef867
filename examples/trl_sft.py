"""Fine-tune a folded model with TRL's SFTTrainer: all weights or LoRA, rows padded or packed.

secvec fold MODEL --vector vector.safetensors -o folded
python examples/trl_sft.py folded train.jsonl trained [--lora] [--packing]
secvec unfold trained -o defended
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

LR, LORA_LR = 4e-4, 2e-3  # for the bundled tiny assistant; 2e-5 and 2e-4 are usual
# By name: what "all-linear" means changes between versions of peft.
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(folded: str, data: str, out: str, *, lora: bool, packing: bool) -> None:
    args = SFTConfig(
        output_dir=out,
        learning_rate=LORA_LR if lora else LR,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        assistant_only_loss=True,
        packing=packing,
        max_length=512,
        weight_decay=0.0,  # it would act on W + D, and take part of D off the result
        seed=0,
        data_seed=0,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM") if lora else None
    rows = load_dataset("json", data_files=data, split="train")
    trainer = SFTTrainer(folded, args, train_dataset=rows, peft_config=adapter)
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folded")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--packing", action="store_true")
    words = parser.parse_args()
    main(words.folded, words.data, words.out, lora=words.lora, packing=words.packing)
