"""The speed of `scan` beside the bare forward passes over the same tokens, in the same batches; its memory."""

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed.measure import peak_mb
from secvec.arm import armed
from secvec.demo import assistant_folder
from secvec.models import default_device, load_model, load_tokenizer
from secvec.samples import read_samples
from secvec.scan import ScanConfig, scan
from secvec.tokens import collate, encode_all
from secvec.vector import SecurityVector


@dataclass(frozen=True)
class Speed:
    """Seconds, the median of `repeats`; ratios: bare passes over scan, so that 1 is as fast and less is slower."""

    rows: int
    tokens: int
    scan_s: float
    unarmed_s: float
    armed_s: float
    of_the_two_passes: float
    of_two_unarmed_passes: float
    repeats: int


def speed(vector: SecurityVector, data: Path, repeats: int) -> Speed:
    """Time scan from the call to the written page, and one unarmed and one armed pass, in turns."""
    folder, config = assistant_folder(), ScanConfig()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.to(default_device())  # pyright: ignore[reportArgumentType]
    rows = encode_all(read_samples(data).rows, tokenizer, 512)
    batches = _batches([len(row.ids) for row in rows], config)

    def bare(with_vector: bool) -> None:
        with armed(model, vector) if with_vector else nullcontext(), torch.inference_mode():
            for batch in batches:
                inputs = collate([rows[i] for i in batch], pad_id=0).to(model.device).inputs()
                # Read a value, so that a GPU has finished.
                float(model(**inputs, use_cache=False).logits[0, 0, 0])

    def whole() -> None:
        with tempfile.TemporaryDirectory() as out:
            scan(folder, data, Path(out) / "scan", vectors=[vector], config=config)

    took = {"scan": list[float](), "unarmed": list[float](), "armed": list[float]()}
    bare(True)
    for _ in range(repeats):
        took["unarmed"].append(_seconds(lambda: bare(False)))
        took["armed"].append(_seconds(lambda: bare(True)))
        took["scan"].append(_seconds(whole))
    middle = {name: sorted(values)[len(values) // 2] for name, values in took.items()}
    return Speed(
        len(rows),
        sum(len(row.ids) for row in rows),
        *(round(middle[name], 3) for name in ("scan", "unarmed", "armed")),
        round((middle["unarmed"] + middle["armed"]) / middle["scan"], 3),
        round(2 * middle["unarmed"] / middle["scan"], 3),
        repeats,
    )


@dataclass(frozen=True)
class Memory:
    """The highest resident memory of a process that scanned, and how long the scan took."""

    rows: int
    peak_mb: float
    scan_s: float


def memory(vector: SecurityVector, rows: int) -> Memory:
    """Scan distinct rows of a few tokens: what grows with their number is what counts."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with data.open("w", encoding="utf-8") as file:
            file.writelines(f'{{"prompt": "{i}", "completion": "yes"}}\n' for i in range(rows))
        took_s = _seconds(lambda: scan(assistant_folder(), data, Path(folder) / "scan", vectors=[vector]))
    return Memory(rows, round(peak_mb(), 1), round(took_s, 1))


def _batches(lengths: list[int], config: ScanConfig) -> list[list[int]]:
    """The batches of `secvec.evidence`, window by window."""
    batches: list[list[int]] = []
    for start in range(0, len(lengths), config.window_rows):
        batch: list[int] = []
        window = range(start, min(start + config.window_rows, len(lengths)))
        for i in sorted(window, key=lambda i: -lengths[i]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > config.batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return batches


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
