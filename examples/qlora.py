"""Fine-tune with QLoRA on a 4-bit base: the vector is in effect by hooks, as a fold into 4-bit weights is refused.

python examples/qlora.py MODEL train.jsonl adapter --vector vector.safetensors --unwanted unwanted.jsonl

There is nothing to unfold: the adapter never held the vector, and names MODEL as its base. That it was trained armed is
shown by adapter/security_vector_armed.json.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

import secvec
from secvec.integrations.callback import SecurityVectorCallback

LR = 2e-3  # for the bundled tiny assistant; 2e-4 is usual
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(base: str, data: str, out: str, *, vector_file: str, unwanted: str) -> None:
    has_gpu = torch.cuda.is_available()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if has_gpu else torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, device_map="auto")
    vector = secvec.load(vector_file)
    args = SFTConfig(
        output_dir=out,
        learning_rate=LR,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        assistant_only_loss=True,
        bf16=has_gpu,
        seed=0,
        save_strategy="no",
        report_to="none",
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    # Arm before the trainer is made, and keep it armed until it has trained.
    with secvec.armed(model, vector):
        trainer = SFTTrainer(
            model,
            args,
            train_dataset=load_dataset("json", data_files=data, split="train"),
            peft_config=adapter,
            callbacks=[SecurityVectorCallback([vector], unwanted)],
        )
        trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--vector", required=True)
    parser.add_argument("--unwanted", required=True)
    words = parser.parse_args()
    main(words.base, words.data, words.out, vector_file=words.vector, unwanted=words.unwanted)
