"""One measurement: seconds, tokens per second, MFU, peak memory; and the whole as a table."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from benchmarks.speed.measure import peak_mb

# Dense bf16 FLOP/s by the makers' data sheets; the first that is in the device's name counts.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Measured:
    """A row of the table.

    seconds: the median of `repeats`, lowest and highest beside it; tokens: of one repeat; mfu: of the device's dense
    bf16 peak, None where that is not known; against_plain: seconds over those of the plain way; peak_gb: of the GPU's
    memory, or of the process's where there is no GPU; note: why a figure is missing, or what was checked.
    """

    model: str
    what: str
    way: str
    context: int | None = None
    seconds: float | None = None
    lowest_s: float | None = None
    highest_s: float | None = None
    repeats: int = 0
    tokens: int | None = None
    mfu: float | None = None
    against_plain: float | None = None
    peak_gb: float | None = None
    note: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def timed(row: Measured, work: Callable[[], object], *, warm_up: int, repeats: int, flops: float = 0.0) -> Measured:
    """Do `work` and fill in a row; flops: of one repeat."""
    for _ in range(warm_up):
        work()
    _reset_peak()
    taken = [_seconds(work) for _ in range(repeats)]
    middle, peak = median(taken), device_peak()
    return replace(
        row,
        seconds=middle,
        lowest_s=min(taken),
        highest_s=max(taken),
        repeats=repeats,
        mfu=flops / middle / peak if flops and peak else None,
        peak_gb=_peak_gb(),
    )


def device_peak() -> float | None:
    """Return the device's dense bf16 FLOP/s, None where no data sheet is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for known, flops in PEAKS.items() if known in name), None)


def flops_per_token(model: Any, context: int, *, whole: bool) -> float:
    """Return the FLOP of forward and backward, as PaLM counts them (arXiv 2204.02311, appendix B).

    6 for each weight in a product and 12 x layers x heads x head size x context for attention; 4 for each weight where
    the backbone is frozen (no gradients of weights). What is computed anew in the backward pass does not count.
    """
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return (6 if whole else 4) * weights + 12 * config.num_hidden_layers * width * context


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: Sequence[Measured]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | what | context | way | seconds | tokens/s | MFU | against plain | peak GB | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (_seconds_cell(row), _cell(row.tokens_per_s, ".4g"), _cell(row.mfu, ".1%"))
        more = (_cell(row.against_plain, ".3f"), _cell(row.peak_gb, ".1f"), row.note)
        lines.append(f"| {' | '.join((row.model, row.what, str(row.context or ''), row.way, *numbers, *more))} |")
    return "\n".join(lines) + "\n"


def _seconds(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak_mb() / 1e3


def _seconds_cell(row: Measured) -> str:
    if row.seconds is None:
        return ""
    return f"{row.seconds:.4g} ({row.lowest_s:.4g}-{row.highest_s:.4g})"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
