"""The rows about checkpoints on disk: fold and unfold beside `cp` and PEFT's merge."""

import sys
import tempfile
from pathlib import Path

from benchmarks.speed.checkpoint import SHAPES, random_vector, write_base, write_trained
from benchmarks.speed.measure import Row, memory_row, run_in_turns, speed_row
from secvec.artifact import save
from secvec.fold import fold
from secvec.peft_format import to_peft

RANK = 16


def file_rows(size: str, repeats: int, scratch: Path) -> list[Row]:
    """Generate a checkpoint in `scratch`, measure, and delete it."""
    with tempfile.TemporaryDirectory(prefix="secvec-speed-", dir=scratch) as folder:
        return _measure(Path(folder), size, repeats)


def _measure(folder: Path, size: str, repeats: int) -> list[Row]:
    base, folded, trained, out = (folder / name for name in ("base", "folded", "trained", "out"))
    total_bytes = _prepare(folder, size)
    task = [sys.executable, "-m", "benchmarks.speed.task"]
    commands = {
        "cp": ["cp", "-r", str(base), str(out)],
        "cp, synced": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)],
        "fold": [*task, "fold", str(base), str(folder / "vector.safetensors"), str(out)],
        "unfold, untrained": [*task, "unfold", str(folded), str(out)],
        "unfold, trained": [*task, "unfold", str(trained), str(out)],
        "PEFT merge": [*task, "merge", str(base), str(folder / "adapter"), str(out)],
    }
    samples = run_in_turns(commands, out, repeats)
    rows: list[Row] = []
    for what in ("fold", "unfold, untrained", "unfold, trained"):
        rows += [
            speed_row(what, samples[what], other, samples[other], total_bytes)
            for other in ("cp", "cp, synced", "PEFT merge")
        ]
        rows.append(memory_row(what, samples[what], "PEFT merge", samples["PEFT merge"]))
    return rows


def _prepare(folder: Path, size: str) -> int:
    """Write base, vector, adapter, folded and trained model; return the bytes of the base's weights."""
    shape, base = SHAPES[size], folder / "base"
    write_base(base, shape)
    vector = random_vector(shape, base, RANK)
    save(vector, folder / "vector.safetensors")
    to_peft(vector, folder / "adapter", str(base))
    fold(base, [vector], folder / "folded")
    write_trained(folder / "folded", folder / "trained")
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))
