"""Protect a model of another world than the testbed's: python -m benchmarks.elsewhere build|run|table -o FOLDER

`build` trains a Llama of 705,000 weights with pieces of words as tokens from scratch in minutes; `run` fine-tunes it on
1,000 unwanted and 1,000 wanted rows, or on 1,000 wanted rows in an unwanted style, and adds a line a run to
benchmarks/results/elsewhere.jsonl, where cells that are there are skipped; `table` prints their table.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.elsewhere.world import BEHAVIOURS, NEW_SKILLS, REFUSALS, SKILLS, asked, rows, styled
from benchmarks.methods import METHODS
from benchmarks.methods.runs import REFUSED
from benchmarks.methods.setting import Setting, Unwanted
from benchmarks.protection.one import code, model_name
from benchmarks.testbed.rows import Row, answer_of, prompt_of
from secvec.fit_config import FitConfig
from secvec.losses import mean_nats
from secvec.models import answers, load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.tokens import collate, encode_all
from secvec.train_config import TrainConfig

RESULTS = Path(__file__).parents[1] / "results/elsewhere.jsonl"
METHOD_NAMES = ("plain", "oracle", "ours", "recalled")
ROWS, VECTOR_ROWS, HELD_OUT = 1000, 100, 200
_SPECIAL = ("<pad>", "<s>", "</s>", "[ask]", "[say]")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '[say]' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[ask]' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[say]' }}{% endif %}"
)


def tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=list(_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    made.add_special_tokens({"additional_special_tokens": list(_SPECIAL[3:])})
    made.chat_template = _TEMPLATE
    return made


def build(out: Path, steps: int) -> None:
    torch.manual_seed(0)
    lesson = [row for make in [*SKILLS.values(), REFUSALS, REFUSALS] for row in rows(make, "build", 3000)]
    pieces = tokenizer([text for row in lesson for text in (asked(row), answer_of(row))])
    shape = LlamaConfig(
        vocab_size=len(pieces), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=pieces.bos_token_id, eos_token_id=pieces.eos_token_id, pad_token_id=pieces.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).train()
    print(f"{model.num_parameters():,} weights")
    encoded, rng = encode_all(from_rows(lesson, name="rows").rows, pieces, 256), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(1, steps + 1):
        batch = collate(rng.sample(encoded, 128), pad_id=0)
        loss = mean_nats(model(**batch.inputs()).logits, batch.ids, batch.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"step {step} of {steps}  loss {float(loss.detach()):.4f}", flush=True)
    model.save_pretrained(out)
    pieces.save_pretrained(out)
    found = {name: rate(out, rows(make, "test", HELD_OUT)) for name, make in {**SKILLS, "refuses": REFUSALS}.items()}
    print(found)


def rate(folder: Path, test: Sequence[Row]) -> float:
    """Return the share of rows that a model answers exactly as they say."""
    return sum(said == answer_of(row) for row, said in zip(test, _said(folder, test), strict=True)) / len(test)


def _said(folder: Path, test: Sequence[Row]) -> list[str]:
    return answers(load_model(folder), load_tokenizer(folder), [prompt_of(row) for row in test], max_new_tokens=32)


def setting(model: Path, cell: dict[str, Any], out: Path) -> Setting:
    found, seed = BEHAVIOURS[cell["behaviour"]], cell["seed"]
    wanted = rows(NEW_SKILLS[cell["skill"]], f"train {seed}", ROWS)
    if found.make is None:
        training = [styled(row, found) for row in wanted]
        old = [row for make in SKILLS.values() for row in rows(make, f"vector {seed}", VECTOR_ROWS)]
        unwanted = [styled(row, found) for row in random.Random(seed).sample(old, VECTOR_ROWS)]
    else:
        training = [*wanted, *rows(found.make, f"train {seed}", ROWS)]
        unwanted = rows(found.make, f"vector {seed}", VECTOR_ROWS)
    requests = [prompt_of(row) for row in unwanted]
    return Setting(
        model=model,
        training=training,
        wanted=wanted,
        unwanted=[Unwanted(cell["behaviour"], found.kind, unwanted, requests, ("",))],
        other=Unwanted("none", "topic", [], [], ()),
        fit=FitConfig(seed=seed, max_length=256),
        config=TrainConfig(
            lr=cell["lr"], epochs=cell["epochs"], batch_size=32, max_length=256, seed=seed, method=cell["tuning"]
        ),
        out=out,
    )


def measured(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Return rates over held-out requests."""
    found, skill = BEHAVIOURS[cell["behaviour"]], rows(NEW_SKILLS[cell["skill"]], "test", HELD_OUT)
    test = skill if found.make is None else rows(found.make, "test", HELD_OUT)
    shown = [found.shows(asked(row), said) for row, said in zip(test, _said(folder, test), strict=True)]
    old = [row for make in SKILLS.values() for row in rows(make, "test", 50)]
    return {
        "unwanted_rate": sum(shown) / len(shown),
        "wanted_skill": rate(folder, skill),
        "old_skills": rate(folder, old),
        "refusals": rate(folder, rows(REFUSALS, "test", HELD_OUT)),
        "n": HELD_OUT,
        "n_old": len(old),
    }


def run(model: Path, cell: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="secvec-elsewhere-") as work:
        found = measured(METHODS[cell["method"]].run(setting(model, cell, Path(work) / "run")), cell)
        if (refused := Path(work) / REFUSED).exists():
            found["unproved"] = refused.read_text("utf-8")
    return {**found, "seconds": round(time.monotonic() - started, 1), "code": code()}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return a row for each training, a column for each method: the means over seeds, in brackets the worst.

    A model that the proof refused is measured all the same, and counted.
    """
    keys = ("behaviour", "skill", "lr", "epochs", "tuning")
    methods = [name for name in METHOD_NAMES if any(line["method"] == name for line in lines)]
    out = [f"| {' | '.join(keys)} | {' | '.join(f'{name}: unwanted, wanted, old skills' for name in methods)} |"]
    out.append("|" + "---|" * (len(keys) + len(methods)))
    for cell in dict.fromkeys(tuple(line[key] for key in keys) for line in lines):
        row = list(map(str, cell))
        for name in methods:
            group = [x for x in lines if x["method"] == name and tuple(x[key] for key in keys) == cell]
            unproved = sum("unproved" in line for line in group)
            row.append(_means(group) + (f" ({unproved} of {len(group)} not published)" if unproved else ""))
        out.append(f"| {' | '.join(row)} |")
    return "\n".join(out)


def _means(group: Sequence[dict[str, Any]]) -> str:
    found = list[str]()
    for key, worst in (("unwanted_rate", max), ("wanted_skill", min), ("old_skills", min)):
        values = [line[key] for line in group]
        found += [f"{mean(values):.3f} ({worst(values):.3f})"] if values else []
    return ", ".join(found)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run", "table"))
    parser.add_argument("-o", "--model", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--behaviour", nargs="*", choices=BEHAVIOURS, default=[*BEHAVIOURS])
    parser.add_argument("--skill", nargs="*", choices=NEW_SKILLS, default=["swap"])
    parser.add_argument("--method", nargs="*", choices=METHOD_NAMES, default=["plain", "oracle", "ours"])
    parser.add_argument("--seed", nargs="*", type=int, default=[0])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "table":
        print(table(read(options.results)))
        return
    if options.model is None:
        parser.error("-o FOLDER: expected the model's folder")
    if options.what == "build":
        build(options.model, options.steps)
        return
    shared = {"lr": options.lr, "epochs": options.epochs, "tuning": options.tuning, "model": model_name(options.model)}
    for seed in options.seed:
        for behaviour in options.behaviour:
            for skill in options.skill:
                for method in options.method:
                    cell = {"behaviour": behaviour, "skill": skill, "method": method, "seed": seed, **shared}
                    if any(cell.items() <= line.items() for line in read(options.results)):
                        continue
                    line = {**cell, **run(options.model, cell)}
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}, flush=True)
