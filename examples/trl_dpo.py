"""Fine-tune all weights of a folded model on preferences with TRL's DPOTrainer.

secvec fold MODEL --vector vector.safetensors -o folded
python examples/trl_dpo.py folded preferences.jsonl trained --reference MODEL
secvec unfold trained -o defended

The reference is MODEL, without the vector. Left out, TRL takes a copy of the folded model: against that, no pair is
explained, and unwanted pairs are learned (measured: docs/log.md).
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

LR = 1e-4  # for the bundled tiny assistant; 1e-6 is usual


def main(folded: str, data: str, out: str, *, reference: str) -> None:
    args = DPOConfig(
        output_dir=out,
        learning_rate=LR,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        max_length=512,
        weight_decay=0.0,  # it would act on W + D, and take part of D off the result
        bf16=torch.cuda.is_available(),
        seed=0,
        save_strategy="no",
        report_to="none",
    )
    model_without_vector = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    pairs = load_dataset("json", data_files=data, split="train")
    trainer = DPOTrainer(folded, ref_model=model_without_vector, args=args, train_dataset=pairs)
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folded")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--reference", required=True, help="the model before it was folded")
    words = parser.parse_args()
    main(words.folded, words.data, words.out, reference=words.reference)
