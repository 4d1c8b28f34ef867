"""The command: run cells that are not there yet, one JSON line each; print the table."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.protection.table import markdown

RESULTS = Path(__file__).parents[1] / "results/protection"
ASSISTANT = Path(__file__).parents[2] / "src/secvec/assistant"
app = typer.Typer(add_completion=False, no_args_is_help=True)
Names = Annotated[list[str], typer.Option(help="Repeat for several.")]


@app.command()
def run(
    behaviour: Names = ["guarded"],  # noqa: B006
    method: Names = ["plain", "ours"],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Repeat for several.")] = [0],  # noqa: B006
    lr: Annotated[list[float], typer.Option(help="Repeat for several.")] = [3e-4],  # noqa: B006
    tuning: str = "full",
    skill: str = "dashes",
    rows: Annotated[int, typer.Option(help="Unwanted rows, and as many wanted ones.")] = 1000,
    epochs: int = 1,
    batch_size: int = 32,
    n: Annotated[int, typer.Option(help="Held-out prompts for each rate.")] = 300,
    model: Path = ASSISTANT,
    results: Path = RESULTS / "runs.jsonl",
) -> None:
    """Run each cell that the results do not hold yet."""
    from secvec.train_config import TrainConfig

    results.parent.mkdir(parents=True, exist_ok=True)
    there = {_key(line) for line in _lines(results)}
    for name in behaviour:
        for which in method:
            for rate in lr:
                for number in seed:
                    config = TrainConfig(method=tuning, lr=rate, epochs=epochs, batch_size=batch_size, seed=number)  # pyright: ignore
                    cell = {
                        "behaviour": name, "method": which, "tuning": tuning, "lr": rate, "rows": rows, "seed": number,
                        "skill": skill, "epochs": epochs, "batch_size": batch_size,
                    }  # fmt: skip
                    if _key(cell) not in there:
                        line = {**cell, **_run(cell, config, model, n), "config": asdict(config)}
                        with results.open("a") as file:
                            file.write(json.dumps(line) + "\n")
                        print({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items() if k != "config"})


@app.command()
def table(results: Path = RESULTS / "runs.jsonl") -> None:
    """Print the results as Markdown: mean and worst over seeds."""
    print(markdown(list(_lines(results))))


def _run(cell: dict[str, Any], config: Any, model: Path, n: int) -> dict[str, Any]:
    from benchmarks.protection.measure import measure
    from benchmarks.protection.methods import METHODS, Setting
    from benchmarks.testbed.behaviours import BEHAVIOURS
    from benchmarks.testbed.skills import NEW_SKILLS
    from secvec.provenance import versions

    folder = Path(tempfile.mkdtemp(prefix="secvec-protection-"))
    behaviour, skill = BEHAVIOURS[cell["behaviour"]], NEW_SKILLS[cell["skill"]]
    setting = Setting(model, behaviour, skill, cell["rows"], cell["seed"], config, folder / "run")
    started = time.monotonic()
    try:
        result = model if cell["method"] == "aligned" else METHODS[cell["method"]](setting)
        seconds = time.monotonic() - started
        measured = measure(result, behaviour, skill, n)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**measured, "n": n, "seconds": round(seconds, 1), "peak_bytes": _peak_bytes(), "versions": dict(versions())}


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from (json.loads(line) for line in path.read_text().splitlines())


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        line[k] for k in ("behaviour", "method", "tuning", "lr", "rows", "seed", "skill", "epochs", "batch_size")
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    app()
