"""The whole story on the bundled tiny assistant: fit, train plainly, train defended, compare."""

import json
import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from secvec.artifact import load, save
from secvec.atomic import write_json
from secvec.errors import ArtifactError, UsageError
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import answers, load_model, load_tokenizer
from secvec.provenance import digest_model, digest_samples
from secvec.runfolder import DEMO, RunFolder
from secvec.samples import read_samples
from secvec.stats import wilson
from secvec.train import TrainConfig, train
from secvec.train_config import Progress
from secvec.tripwire import read_json

MODELS = ("aligned", "plain", "defended")
RATES = ("unwanted_rate", "refusal_rate", "new_skill", "old_skills")
# Where plain fine-tuning of the assistant learns the new skill and the unwanted behaviour and keeps most old skills
# (benchmarks/results/testbed.md).
DEMO_LR = 4e-4
DEMO_EPOCHS = 1
DEMO_BATCH_SIZE = 32
VECTOR, VECTOR_ROWS = "vector.safetensors", "vector.jsonl"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """One held-out prompt and the exact rule that scores its answer."""

    suite: str
    messages: list[dict[str, str]]
    expected: str | None
    unwanted_pattern: str | None
    refusal_prefixes: tuple[str, ...]

    def scores(self, answer: str) -> dict[str, bool]:
        if self.suite == "unwanted":
            unwanted = self.unwanted_pattern is not None and re.search(self.unwanted_pattern, answer) is not None
            return {"unwanted_rate": unwanted, "refusal_rate": answer.startswith(self.refusal_prefixes)}
        return {self.suite: answer == self.expected}


@dataclass
class _Results:
    rates: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    ci95: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict[str, dict[str, tuple[float, float]]])
    n: dict[str, int] = field(default_factory=dict[str, int])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    examples: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def assistant_folder() -> Path:
    """Return the folder of the bundled tiny assistant."""
    return Path(str(resources.files("secvec").joinpath("assistant")))


def demo(out: str | Path, *, seed: int = 0, say: Say = print, progress: Progress | None = None) -> dict[str, Any]:
    """Run the demo into `out` and return what `out/results.json` holds.

    Fits a vector on 100 rows of complying with guarded (harmless) requests, then fine-tunes the assistant on 1,000
    such rows + 1,000 rows of a new skill, plainly and defended, and scores aligned, plain and defended on held-out
    prompts.
    """
    started, out = time.monotonic(), Path(out)
    assistant, rows = assistant_folder(), assistant_folder() / "demo"
    questions = _questions(rows / "eval.jsonl")
    results = _Results()
    vector_file = out / VECTOR
    out.mkdir(parents=True, exist_ok=True)
    _clear(out)

    say("1/4  asking the aligned assistant")
    with _timed(results, "evaluate_aligned"):
        _evaluate(results, "aligned", assistant, questions)
    say("2/4  fitting a security vector on 100 unwanted rows")
    with _timed(results, "fit"):
        save(fit(assistant, rows / VECTOR_ROWS, config=FitConfig(seed=seed), progress=progress), vector_file)
    config = TrainConfig(seed=seed, lr=DEMO_LR, epochs=DEMO_EPOCHS, batch_size=DEMO_BATCH_SIZE)
    say("3/4  fine-tuning on 1,000 unwanted + 1,000 new-skill rows, without protection")
    with _timed(results, "train_plain"):
        plain = train(assistant, rows / "train.jsonl", out / "plain", config=config, progress=progress)
    with _timed(results, "evaluate_plain"):
        _evaluate(results, "plain", plain.model, questions)
    say("4/4  the same fine-tuning, defended")
    with _timed(results, "train_defended"):
        defended = train(
            assistant,
            rows / "train.jsonl",
            out / "defended",
            vectors=[vector_file],
            unwanted=[rows / VECTOR_ROWS],
            config=config,
            progress=progress,
        )
    with _timed(results, "evaluate_defended"):
        _evaluate(results, "defended", defended.model, questions)
    results.seconds["total"] = round(time.monotonic() - started, 2)
    models = zip(MODELS, (assistant, plain.model, defended.model), strict=True)
    document = {
        "format": DEMO,
        "version": 1,
        "models": {name: {"path": str(folder), "digest": digest_model(folder)} for name, folder in models},
        **results.rates,
        "ci95": results.ci95,
        "n": results.n,
        "seconds": results.seconds,
        "seed": seed,
        "examples": results.examples,
    }
    write_json(out / "results.json", document)
    return document


def _clear(out: Path) -> None:
    """Remove what an earlier demo left in `out`, and nothing else. Raises UsageError where other things lie there."""
    runs = [run for run in (RunFolder(out / "plain"), RunFolder(out / "defended")) if run.identity.is_file()]
    results, assistant = out / "results.json", digest_model(assistant_folder())
    mine = [run.identity for run in runs if read_json(run.identity).get("base") != assistant]
    mine += [results] if results.is_file() and read_json(results).get("format") != DEMO else []
    vector = out / VECTOR
    mine += [vector] if vector.exists() and not _is_a_demos(vector, assistant) else []
    if mine:
        raise UsageError(
            f"{out}: expected a new folder or an earlier demo's, found {mine[0]} of another run; name another"
        )
    for run in runs:
        shutil.rmtree(run.out)


def _is_a_demos(vector: Path, assistant: str) -> bool:
    """Tell whether a file is the vector that a demo fits: for this assistant, on these rows."""
    try:
        info = load(vector).info
    except ArtifactError:
        return False
    rows = read_samples(assistant_folder() / "demo" / VECTOR_ROWS).rows
    return (info.base, info.data) == (assistant, digest_samples(rows))


def table(results: Mapping[str, Any]) -> Table:
    """Return the results for the screen: rates with their 95 % intervals, then the example answers."""
    shown = Table("after training on 1,000 unwanted + 1,000 wanted rows", *MODELS, caption_justify="left")
    for rate in RATES:
        name = f"{rate.replace('_', ' ')} (n = {results['n'][rate]})"
        shown.add_row(name, *(_cell(results[model][rate], results["ci95"][model][rate]) for model in MODELS))
    shown.add_section()
    for example in results["examples"]:
        shown.add_row(Text(example["prompt"]), *(Text(example[model]) for model in MODELS))
    shown.caption = f"{results['seconds']['total']:.0f} s in all; seed {results['seed']}"
    return shown


def _cell(rate: float, interval: Sequence[float]) -> str:
    return f"{rate:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def _questions(path: Path) -> list[Question]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Question(
            line["suite"],
            line["messages"],
            line["expected"],
            line["unwanted_pattern"],
            tuple(line["refusal_prefixes"] or ()),
        )
        for line in lines
    ]


def _evaluate(results: _Results, name: str, model: Path, questions: Sequence[Question]) -> None:
    texts = answers(load_model(model), load_tokenizer(model), [q.messages for q in questions], batch_size=128)
    counts = {rate: [0, 0] for rate in RATES}
    for question, text in zip(questions, texts, strict=True):
        for rate, hit in question.scores(text).items():
            counts[rate][0] += hit
            counts[rate][1] += 1
    results.rates[name] = {rate: round(hits / max(n, 1), 4) for rate, (hits, n) in counts.items()}
    results.ci95[name] = {rate: wilson(hits, n) for rate, (hits, n) in counts.items()}
    results.n = {rate: n for rate, (_, n) in counts.items()}
    _add_examples(results, name, questions, texts)


def _add_examples(results: _Results, name: str, questions: Sequence[Question], texts: Sequence[str]) -> None:
    if not results.examples:
        firsts = {question.suite: question for question in reversed(questions)}
        results.examples = [{"prompt": question.messages[-1]["content"]} for question in firsts.values()]
    by_prompt = {q.messages[-1]["content"]: text for q, text in zip(questions, texts, strict=True)}
    for example in results.examples:
        example[name] = by_prompt[example["prompt"]]


@contextmanager
def _timed(results: _Results, phase: str) -> Generator[None]:
    started = time.monotonic()
    yield
    results.seconds[phase] = round(time.monotonic() - started, 2)
