"""The rows about checkpoints on disk: fold and unfold beside `cp` and PEFT's merge."""

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.speed.checkpoint import RANK, SHAPES, prepare, write_trained
from benchmarks.speed.measure import Row, Settings, memory_row, run_in_turns, speed_row
from benchmarks.speed.report import command, machine


def about(settings: Settings) -> str:
    return (
        "# Speed of fold and unfold\n\n"
        f"Made by `{command('files', settings)}` on {machine()}, bf16, rank {RANK} on all linear layers. Medians of "
        f"{settings.repeats} repeats in turns, lowest and highest in brackets. GB/s are bytes of the base checkpoint "
        "per second; process start and imports are not counted. `fold` and `unfold` hash what they read and sync what "
        "they write; `cp` does neither.\n"
    )


def file_rows(settings: Settings) -> list[Row]:
    """Generate a checkpoint in `scratch`, measure, and delete it."""
    with tempfile.TemporaryDirectory(prefix="secvec-speed-", dir=settings.scratch) as folder:
        return _measure(Path(folder), settings)


def _measure(folder: Path, settings: Settings) -> list[Row]:
    base, folded, trained, out = (folder / name for name in ("base", "folded", "trained", "out"))
    prepare(folder, SHAPES[settings.size], torch.bfloat16)
    write_trained(folded, trained)
    total_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    task = [sys.executable, "-m", "benchmarks.speed.task"]
    commands = {
        "cp": ["cp", "-r", str(base), str(out)],
        "cp, synced": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)],
        "fold": [*task, "fold", str(base), str(folder / "vector.safetensors"), str(out)],
        "unfold, untrained": [*task, "unfold", str(folded), str(out)],
        "unfold, trained": [*task, "unfold", str(trained), str(out)],
        "PEFT merge": [*task, "merge", str(base), str(folder / "adapter"), str(out)],
    }
    samples = run_in_turns(commands, out, settings.repeats)
    rows: list[Row] = []
    for what in ("fold", "unfold, untrained", "unfold, trained"):
        rows += [
            speed_row(what, samples[what], other, samples[other], total_bytes)
            for other in ("cp", "cp, synced", "PEFT merge")
        ]
        rows.append(memory_row(what, samples[what], "PEFT merge", samples["PEFT merge"]))
    return rows
