"""`python -m benchmarks.scan detection|ordinary|speed|memory`; results go to benchmarks/results/scan.json."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.scan.detection import ORDINARY, detect, detection_table, false_positives, ordinary_table
from benchmarks.scan.speed import memory as measure_memory
from benchmarks.scan.speed import speed as measure_speed
from benchmarks.testbed.behaviours import BEHAVIOURS
from secvec import artifact
from secvec.demo import assistant_folder

RESULTS = Path(__file__).parents[1] / "results/scan.json"
app = typer.Typer(add_completion=False, no_args_is_help=True)
Vector = Annotated[Path, typer.Option(help="Of the bundled assistant.")]


@app.command()
def detection(
    behaviour: Annotated[list[str], typer.Option(help="Repeat for several.")] = list(BEHAVIOURS),  # noqa: B006
    seed: int = 0,
    rows: Annotated[int, typer.Option(help="Unwanted ones; as many of a new skill and of old ones.")] = 400,
    vectors: Annotated[Path | None, typer.Option(help="Keep the fitted vectors in this folder.")] = None,
) -> None:
    """Fit a vector for each behaviour and tell its rows from others."""
    found = []
    for name in behaviour:
        one, vector = detect(name, seed=seed, rows=rows)
        found.append(one)
        if vectors is not None:
            vectors.mkdir(parents=True, exist_ok=True)
            artifact.save(vector, vectors / f"{name}.safetensors")
        _store("detection", {f"{name}/{seed}": asdict(one)})
    print(detection_table(found))


@app.command()
def ordinary(
    vector: Annotated[list[Path], typer.Option(help="Of the bundled assistant; repeat for several.")],
    folder: Annotated[Path, typer.Option(help="Where the files lie.")],
    file: Annotated[list[str], typer.Option(help="In the folder; repeat for several.")] = list(ORDINARY),  # noqa: B006
    rows: Annotated[int, typer.Option(help="The first ones of each file.")] = 500,
) -> None:
    """Count what vectors explain in ordinary files."""
    found = false_positives({path.stem: artifact.load(path) for path in vector}, folder, file, rows)
    _store("ordinary", {f"{each.vector}/{each.file}": asdict(each) for each in found})
    print(ordinary_table(found))


@app.command()
def speed(vector: Vector, data: Path | None = None, copies: int = 1, repeats: int = 3) -> None:
    """Time scan beside bare passes, on the demo's training file by default."""
    text = (data or assistant_folder() / "demo" / "train.jsonl").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_text(text * copies, encoding="utf-8")
        found = measure_speed(artifact.load(vector), path, repeats)
    print(found)
    _store("speed", {"demo": asdict(found)})


@app.command()
def memory(vector: Vector, rows: Annotated[int, typer.Option(help="Short ones, each another.")] = 10_000) -> None:
    """Scan so many rows and say the highest memory of this process; run it with few and with many."""
    found = measure_memory(artifact.load(vector), rows)
    print(found)
    _store("memory", {str(rows): asdict(found)})


def _store(part: str, lines: dict[str, Any]) -> None:
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document[part] = {**document.get(part, {}), **lines}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    app()
