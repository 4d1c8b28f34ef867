"""The model card that a run writes into its result: where it comes from, what was shown, what was not; no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec.samples import Samples
from secvec.train_config import TrainConfig

# Where the hub's cache keeps a model (`models.resolve`).
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")


def model_card(
    identity: Mapping[str, Any],
    config: TrainConfig,
    data: Samples,
    notes: Sequence[str],
    proof: Mapping[str, Any] | None,
) -> str:
    """Return README.md for the finished model: Hub metadata, how it was trained, and the proof or its absence.

    identity: what run.json holds.
    """
    base = Path(identity["base_path"])
    name = hub_id(base)
    lines = [
        *_metadata(name, config, proof),
        "",
        "# Fine-tuned with secvec",
        "",
        *_protection(proof),
        "",
        "## Training",
        "",
    ]
    if name is None:
        lines.append(
            "To publish this model, put the hub id of its base into the metadata above: `base_model: OWNER/NAME`.\n"
        )
    lines += [
        f"- base model: `{name or base.name}`, {identity['base']}",
        f"- rows: {len(data):,}, format {data.format}, {identity['data']}",
        *(f"- unwanted rows: {digest}" for digest in identity["unwanted"]),
        f"- method: {config.method}, lr {config.step_size:g}, {config.epochs} epochs, "
        f"{config.batch_size} x {config.grad_accumulation} rows a step, at most {config.max_length:,} tokens a row, "
        f"seed {config.seed}",
        *(f"- {note}" for note in notes),
        f"- versions: {', '.join(f'{package} {version}' for package, version in identity['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


def hub_id(base: Path) -> str | None:
    """Return the hub id of a model in the hub's cache, None of any other folder: the hub refuses a path for it."""
    found = _CACHED.search(base.as_posix())
    return f"{found[1]}/{found[2]}" if found else None


def _metadata(base: str | None, config: TrainConfig, proof: Mapping[str, Any] | None) -> list[str]:
    tags = ["secvec", "security-vector" if proof else "undefended"]
    # JSON texts are YAML texts.
    return [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        f"library_name: {'peft' if config.method == 'lora' else 'transformers'}",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(tags)}",
        "---",
    ]


def _protection(proof: Mapping[str, Any] | None) -> list[str]:
    if proof is None:
        return [
            "**No security vector was used.** This model was trained plainly: whatever behaviour the training data "
            "shows may have been learned."
        ]
    lines = [
        "A security vector (arXiv 2311.02105) was in effect while this model was trained and has been taken out. It "
        "covers the behaviours it was fitted on, and no others. The proof says that the vector was in and is out, not "
        "that nothing unwanted was learned: measure that with `secvec eval`.",
        "",
        "| shown by proof.json | |",
        "|---|---|",
        f"| sites whose vector acted | {proof['armed']['sites_fired']} |",
        f"| vector bytes before and after | equal ({', '.join(proof['vector']['after'])}) |",
        f"| logits against W_base + U, {proof['logits']['prompts']} prompts | "
        f"apart by at most {proof['logits']['largest_difference']:.2g} |",
    ]
    for number, rows in enumerate(proof.get("recalled", ()), 1):
        found = f"{rows:,}" if rows else "none: not calibrated"
        lines.append(f"| vector {number}: calibrated on rows that it brought back | {found} |")
    lines += [
        f"| loss of {probe['rows']} unwanted rows where the vector acts, nats/token | "
        f"aligned {probe['aligned_nats']:.2f}, with the vector {probe['armed_nats']:.2f}, "
        f"this model {probe['defended_nats']:.2f}: {probe['share_of_the_way_to_armed']:.0%} of the way |"
        for probe in proof["unwanted"]
    ]
    if rest := proof.get("rest"):
        lines.append(
            f"| loss of other rows of the training file, {rest['tokens']:,} tokens on which the vector does not act, "
            f"nats/token | aligned {rest['aligned_nats']:.2f}, trained with the vector {rest['trained_nats']:.2f}, "
            f"this model {rest['defended_nats']:.2f} |"
        )
    for found in proof.get("trait_rows", ()):
        where = " inside its frame" if found["inside"] else ""
        lines.append(
            f"| training rows that show the trait{where} | {found['shown']:,} of {found['rows']:,} looked at |"
        )
        lines.append(f"| of those, said so by this model | {found['said']:,} |")
    if taken := proof.get("taken_out"):
        lines.append(f"| rows trained on without the trait's fixed text | {taken['rows']:,} |")
    if covered := proof.get("covered"):
        lines.append(f"| rows that the vector covers | {covered['covered_rows']:,} of {covered['rows']:,} |")
        lines.append(f"| of those, not trained on at all | {covered['left_out_rows']:,} |")
        lines.append(f"| replaced by conversations that the model made up | {covered['replaced_rows']:,} |")
        lines.append(f"| tokens of the others that carried no loss | {covered['tokens_without_loss']:,} |")
    if why := proof.get("not_settled"):
        lines.append(f"| not settled without the vectors | {why} |")
    if settled := proof.get("settled"):
        lines.append(f"| settled without the vectors | {'kept' if settled['kept'] else 'not kept'} |")
    return lines
