"""One measured task in a process of its own, so that its peak memory is its own; prints its seconds and peak MB.

Imports are not counted; everything from the first to the last byte is.
"""

import sys
import time
from pathlib import Path

from benchmarks.speed.measure import peak_mb


def fold(base: str, vector: str, out: str) -> float:
    from secvec.artifact import load
    from secvec.fold import fold as run

    start_s = time.perf_counter()
    run(base, [load(vector)], out)
    return time.perf_counter() - start_s


def unfold(trained: str, out: str) -> float:
    from secvec.unfold import unfold as run

    start_s = time.perf_counter()
    run(trained, out)
    return time.perf_counter() - start_s


def merge(base: str, adapter: str, out: str) -> float:
    """What PEFT's users do: load, merge, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start_s = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size=_largest_shard(base))
    return time.perf_counter() - start_s


def _largest_shard(base: str) -> int:
    return max(file.stat().st_size for file in Path(base).glob("*.safetensors"))


if __name__ == "__main__":
    seconds = {"fold": fold, "unfold": unfold, "merge": merge}[sys.argv[1]](*sys.argv[2:])
    print(f"measured {seconds} {peak_mb()}")
