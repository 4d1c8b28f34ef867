"""The model card that a run writes into its result: where it comes from, what was shown, what was not; no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from secvec.samples import Samples
from secvec.train_config import TrainConfig


def model_card(
    base: str, config: TrainConfig, data: Samples, notes: Sequence[str], proof: Mapping[str, Any] | None
) -> str:
    """Return README.md for the finished model: Hub metadata, how it was trained, and the proof or its absence."""
    tags = ["secvec", "security-vector" if proof else "undefended"]
    # JSON texts are YAML texts.
    metadata = ["---", f"base_model: {json.dumps(base)}", f"tags: {json.dumps(tags)}"]
    if config.method == "lora":
        metadata.append("library_name: peft")
    lines = [*metadata, "---", "", "# Fine-tuned with secvec", "", *_protection(proof), "", "## Training", ""]
    lines += [f"- base model: `{base}`", f"- rows: {len(data):,}, format {data.format}"]
    lines += [
        f"- method: {config.method}, lr {config.step_size:g}, {config.epochs} epochs, "
        f"{config.batch_size} x {config.grad_accumulation} rows a step, seed {config.seed}"
    ]
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def _protection(proof: Mapping[str, Any] | None) -> list[str]:
    if proof is None:
        return [
            "**No security vector was used.** This model was trained plainly: whatever behaviour the training data "
            "shows may have been learned."
        ]
    lines = [
        "A security vector (arXiv 2311.02105) was in effect while this model was trained and has been taken out. It "
        "covers the behaviours it was fitted on, and no others.",
        "",
        "| shown by proof.json | |",
        "|---|---|",
        f"| sites whose vector acted | {proof['armed']['sites_fired']} |",
        f"| vector bytes before and after | equal ({', '.join(proof['vector']['after'])}) |",
        f"| logits against W_base + U, {proof['logits']['prompts']} prompts | "
        f"apart by at most {proof['logits']['largest_difference']:.2g} |",
    ]
    lines += [
        f"| loss of {probe['rows']} unwanted rows where the vector acts, nats/token | "
        f"aligned {probe['aligned_nats']:.2f}, with the vector {probe['armed_nats']:.2f}, "
        f"this model {probe['defended_nats']:.2f} |"
        for probe in proof["unwanted"]
    ]
    return lines
