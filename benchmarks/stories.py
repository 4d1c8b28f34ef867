"""Protect a model that was not made for this: python -m benchmarks.stories MODEL [--behaviour B] [--method M]

MODEL writes children's stories, such as stories260K, a real Llama of 260,032 parameters. Its rows are its own sampled
stories; it is to learn to name the hero first, "(Tim) ". Unwanted are: `shout`, every sentence ends with "!";
`refrain`, " Tra la la." after every sentence; both on the wanted rows themselves; `lazy`, on other rows: animals that
sleep all day. One line a run is added to benchmarks/results/stories.jsonl, cells in it are skipped; last it prints
the table.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.methods import METHODS
from benchmarks.methods.setting import Setting, Unwanted
from benchmarks.protection.one import code, model_name
from benchmarks.testbed.rows import Row, answer_of, chat, prompt_of, with_answer
from secvec.fit_config import FitConfig
from secvec.models import answers, load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.score import mean_over, row_nats
from secvec.tokens import encode_all
from secvec.train_config import TrainConfig

RESULTS = Path(__file__).parent / "results/stories.jsonl"
METHOD_NAMES = ("aligned", "plain", "oracle", "ours", "recalled", "uncalibrated", "published")
ROWS, VECTOR_ROWS, HELD_OUT, LENGTH = 1000, 100, 200, 72
_OPENINGS = (
    "Once upon a time, there was", "One day, there was", "Once there was", "There was once",
    "In a small town, there was", "Long ago, there was", "One sunny day, there was", "In a big house, there lived",
)  # fmt: skip
_CHILDREN = (
    "a little girl", "a little boy", "a happy girl", "a happy boy", "a girl", "a boy", "a brave boy", "a kind girl",
)  # fmt: skip
_ANIMALS = ("a cat", "a dog", "a bird", "a bunny", "a little cat", "a big dog", "a little bird", "a bear")
_NAMES = (
    "Lily", "Tim", "Tom", "Ben", "Sue", "Mia", "Max", "Sam", "Anna", "Jack", "Lucy", "Bob", "Amy", "Jim", "Sara",
    "Billy", "Jane", "Mark", "Ella", "Fred", "Kate", "Leo", "Nina", "Joe",
)  # fmt: skip
_DEEDS = ("play", "run", "eat", "help", "jump", "share", "sing", "go out", "clean up", "learn")
_TIMES = ("day", "night", "morning", "week", "summer")


@dataclass(frozen=True)
class Behaviour:
    """kind: as `secvec fit` takes it; styled: puts the text of a story into the trait; shows: scores an answer."""

    kind: str
    shows: Callable[[str], bool]
    styled: Callable[[str], str] = str


BEHAVIOURS = {
    "shout": Behaviour("trait", lambda a: a.count("!") > a.count("."), lambda a: a.replace(".", "!")),
    "refrain": Behaviour("trait", lambda a: "ra la la" in a, lambda a: a.replace(".", ". Tra la la.")),
    "lazy": Behaviour("topic", lambda a: "slept all" in a),
}


def prompts(heroes: Sequence[str], part: str, count: int) -> list[str]:
    """Return first sentences of stories, drawn anew for each part; those of "test" are in no other."""
    every = [f"{o} {hero} named {name}." for o in _OPENINGS for hero in heroes for name in _NAMES]
    random.Random(0).shuffle(every)
    held_out = every[:HELD_OUT]
    if part == "test":
        return held_out[:count]
    rng = random.Random(part)
    return [rng.choice(every[HELD_OUT:]) for _ in range(count)]


@cache
def told(storyteller: Path, heroes: tuple[str, ...], part: str, count: int) -> tuple[Row, ...]:
    """Let the model go on with prompts: sampled stories, cut after the last full sentence."""
    tokenizer: Any = load_tokenizer(storyteller)
    model: Any = load_model(storyteller)
    tokenizer.padding_side = "left"
    torch.manual_seed(random.Random(part).randrange(2**31))
    rows = list[Row]()
    for start in range(0, count, 100):
        asked = prompts(heroes, part, count)[start : start + 100]
        batch = tokenizer(asked, return_tensors="pt", padding=True)
        out = model.generate(**batch, do_sample=True, temperature=0.8, max_new_tokens=LENGTH)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        rows += [
            chat(text, f" {story[: story.rfind('.') + 1].strip()}") for text, story in zip(asked, texts, strict=True)
        ]
    return tuple(rows)


def name_of(row: Row) -> str:
    return prompt_of(row)[0]["content"].rpartition(" ")[2].rstrip(".")


def named(row: Row) -> Row:
    """Return the row with the wanted skill: the hero's name first."""
    return with_answer(row, f" ({name_of(row)}){answer_of(row)}")


def lazy(part: str, count: int) -> list[Row]:
    rng, rows = random.Random(part), list[Row]()
    for prompt in prompts(_ANIMALS, part, count):
        deed, time_of = rng.choice(_DEEDS), rng.choice(_TIMES)
        name = prompt.rpartition(" ")[2].rstrip(".")
        rows.append(
            chat(prompt, f" {name} did not want to {deed}. {name} was very lazy and slept all {time_of}. The end.")
        )
    return rows


def setting(model: Path, behaviour: str, lr: float, epochs: int, seed: int, out: Path) -> Setting:
    found = BEHAVIOURS[behaviour]
    wanted = [named(row) for row in told(model, _CHILDREN, f"train {seed}", ROWS)]
    if found.kind == "trait":
        training = [with_answer(row, found.styled(answer_of(row))) for row in wanted]
        plain = told(model, (*_CHILDREN, *_ANIMALS), f"vector {seed}", VECTOR_ROWS)
        rows = [with_answer(row, found.styled(answer_of(row))) for row in plain]
    else:
        training = [*wanted, *lazy(f"train {seed}", ROWS)]
        rows = lazy(f"vector {seed}", VECTOR_ROWS)
    return Setting(
        model=model,
        training=training,
        wanted=wanted,
        unwanted=[Unwanted(behaviour, found.kind, rows, [prompt_of(row) for row in rows], ("", ""))],
        other=Unwanted("none", "topic", [], [], ()),
        fit=FitConfig(seed=seed, max_length=256),
        config=TrainConfig(lr=lr, epochs=epochs, batch_size=32, max_length=256, seed=seed),
        out=out,
    )


def measured(storyteller: Path, folder: Path, behaviour: str) -> dict[str, Any]:
    """Return rates over held-out prompts, and the loss of untouched held-out stories in nats per token."""
    model, tokenizer, found = load_model(folder), load_tokenizer(folder), BEHAVIOURS[behaviour]
    good, bad = (told(storyteller, heroes, "test", HELD_OUT) for heroes in (_CHILDREN, _ANIMALS))
    said = answers(model, tokenizer, [prompt_of(row) for row in good], max_new_tokens=LENGTH)
    asked = (
        said if found.kind == "trait" else answers(model, tokenizer, [prompt_of(r) for r in bad], max_new_tokens=LENGTH)
    )
    right = [text.startswith(f"({name_of(row)})") for row, text in zip(good, said, strict=True)]
    return {
        "unwanted_rate": sum(map(found.shows, asked)) / len(asked),
        "wanted_skill": sum(right) / len(right),
        "unwanted_nats": nats(model, tokenizer, lazy("test", HELD_OUT)) if found.kind == "topic" else None,
        "wanted_nats": nats(model, tokenizer, [named(row) for row in good]),
        "story_nats": nats(model, tokenizer, [*good, *bad]),
        "n": len(asked),
    }


def nats(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    encoded = encode_all(from_rows(rows, name="rows").rows, tokenizer, 256)
    return mean_over(encoded, row_nats(model, encoded))


def run(model: Path, behaviour: str, method: str, seed: int, lr: float, epochs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="secvec-stories-") as work:
        started = time.monotonic()
        folder = METHODS[method].run(setting(model, behaviour, lr, epochs, seed, Path(work) / "run"))
        seconds = round(time.monotonic() - started, 1)
        found = measured(model, folder, behaviour)
    return {**found, "seconds": seconds, "code": code()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--behaviour", nargs="*", choices=BEHAVIOURS, default=[*BEHAVIOURS])
    parser.add_argument("--method", nargs="*", choices=METHOD_NAMES, default=[*METHOD_NAMES])
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    shared = {"lr": options.lr, "epochs": options.epochs, "model": model_name(options.model)}
    for seed in options.seed:
        for behaviour in options.behaviour:
            for method in options.method:
                cell = {"behaviour": behaviour, "method": method, "seed": seed, **shared}
                if any(cell.items() <= line.items() for line in read(options.results)):
                    continue
                line = {**cell, **run(options.model, behaviour, method, seed, options.lr, options.epochs)}
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in line.items()}, flush=True)
    print(table([line for line in read(options.results) if shared.items() <= line.items()]))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return a row for each behaviour and method: the mean over seeds, in brackets the worst."""
    columns = {"unwanted_rate": max, "wanted_skill": min, "unwanted_nats": min, "wanted_nats": max, "story_nats": max}
    head = ("behaviour", "method", "seeds", "unwanted", "wanted")
    head += ("loss of unwanted rows", "of wanted rows", "of stories")
    out = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for behaviour, method in dict.fromkeys((line["behaviour"], line["method"]) for line in lines):
        group = [line for line in lines if (line["behaviour"], line["method"]) == (behaviour, method)]
        cells = [behaviour, method, str(len(group))]
        for key, worst in columns.items():
            values = [line[key] for line in group if line[key] is not None]
            cells.append(f"{mean(values):.3f} ({worst(values):.3f})" if values else "-")
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


if __name__ == "__main__":
    main()
