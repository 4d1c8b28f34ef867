"""python -m benchmarks.testbed build | finish | check | forget | export"""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.testbed.build import BuildConfig
from benchmarks.testbed.build import build as build_assistant
from benchmarks.testbed.build import finish as finish_assistant
from benchmarks.testbed.demo_files import export as export_files

ASSISTANT = Path(__file__).parents[2] / "src/secvec/assistant"
app = typer.Typer(add_completion=False, no_args_is_help=True)

Model = Annotated[Path, typer.Argument(help="A model folder.")]


@app.command()
def build(
    out: Annotated[Path, typer.Option("-o", "--out")] = ASSISTANT,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A BuildConfig field, key=value.")] = None,
) -> None:
    """Train the assistant from scratch on two cores (benchmarks/results/testbed.md says how long)."""
    types = {field.name: type(field.default) for field in fields(BuildConfig)}
    pairs = [pair.split("=", 1) for pair in set_ or []]
    build_assistant(out, BuildConfig(**{key: types[key](value) for key, value in pairs}))  # pyright: ignore


@app.command()
def finish(model: Model) -> None:
    """Repeat the last part of a build on its saved weights."""
    finish_assistant(model, BuildConfig())


@app.command()
def check(model: Model = ASSISTANT, n: int = 200) -> None:
    """Print, on held-out prompts, each skill's exact rate, each family's refusals, new skills and behaviours."""
    from benchmarks.testbed.scoring import check as measure

    print("| what | rate |\n|---|---|")
    for what, rate in measure(model, n):
        print(f"| {what} | {rate:.3f} |")


@app.command()
def forget(
    model: Model = ASSISTANT,
    lr: Annotated[list[float] | None, typer.Option(help="Repeat for several.")] = None,
    behaviour: str = "guarded",
    skill: Annotated[list[str] | None, typer.Option(help="Repeat for several.")] = None,
    epochs: int = 1,
    rows_per_step: int = 16,
    lora_r: Annotated[int, typer.Option(help="0: all weights.")] = 0,
    seed: int = 0,
    n: int = 200,
    per_skill: Annotated[bool, typer.Option(help="Name the old skills that suffered.")] = False,
) -> None:
    """Print what plain fine-tuning on 1,000 unwanted + 1,000 wanted rows learns and forgets, per learning rate."""
    from benchmarks.testbed.finetuning import TuneConfig
    from benchmarks.testbed.finetuning import forget as measure

    print("| behaviour | new skill | method | lr | unwanted | new | old | s |\n|---|---|---|---|---|---|---|---|")
    method = f"LoRA r={lora_r}" if lora_r else "full"
    for name in skill or ["dashes"]:
        for rate in lr or [1e-4, 3e-4, 1e-3, 3e-3]:
            config = TuneConfig(lr=rate, epochs=epochs, rows_per_step=rows_per_step, lora_r=lora_r, seed=seed)
            got = measure(model, behaviour, name, config, n, per_skill=per_skill)
            shown = " | ".join(f"{got.pop(key):.3f}" for key in ("unwanted", "new", "old"))
            print(f"| {behaviour} | {name} | {method} | {rate:g} | {shown} | {got.pop('seconds'):.0f} |", flush=True)
            if per_skill:
                print({key: round(value, 2) for key, value in got.items() if value < 0.9})


@app.command()
def export(out: Annotated[Path, typer.Option("-o", "--out")] = ASSISTANT / "demo", skill: str = "dashes") -> None:
    """Write the demo's files: 100 vector rows, 2,000 training rows, held-out questions with their exact rules."""
    export_files(out, skill)


if __name__ == "__main__":
    torch.set_num_threads(2)
    app()
