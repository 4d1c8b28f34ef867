"""`python -m benchmarks.speed` runs and gives every row; its variants of training are what they are called."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed.checkpoint import prepare
from benchmarks.speed.measure import step_row
from benchmarks.speed.variants import METHODS, WAYS, WORKLOADS, trainee

ROOT = Path(__file__).parents[1]
TINY = WORKLOADS["tiny"]
FILE_ROWS = {
    (what, against)
    for what in ("fold", "unfold, untrained", "unfold, trained")
    for against in ("cp", "cp, synced", "PEFT merge")
} | {(f"{what}, peak memory", "PEFT merge") for what in ("fold", "unfold, untrained", "unfold, trained")}
TRAINING_ROWS = {
    (what.format(method, way), against)
    for method, peft in (("full fine-tuning", "PEFT, frozen adapter"), ("LoRA", "PEFT, two adapters"))
    for what in ("step, {}, {}", "{}, {}, peak memory")
    for way in ("folded", "hooked")
    for against in ("plain", peft)
} | {
    *((f"step, {method}, plain, again", "plain") for method in ("full fine-tuning", "LoRA")),
    *((what, "PEFT LoRA, bare loop") for what in ("fit", "fit, peak memory")),
}


def positive(row: dict[str, Any]) -> bool:
    bounds = [*row["ours_range"], *row["theirs_range"], *row.get("ratio_ci95", [])]
    return all(math.isfinite(n) and n > 0 for n in (row["ours"], row["theirs"], row["ratio"], *bounds))


def test_the_command_measures_every_row_at_tiny_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--size", "tiny", "--repeats", "1", "--steps", "3"]
    files = ["--scratch", str(tmp_path), "--json", str(tmp_path / "f.json"), "--markdown", str(tmp_path / "f.md")]
    # Models so small are slower with threads.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "f.json").read_text())
    assert {(row["what"], row["against"]) for row in rows} == FILE_ROWS | TRAINING_ROWS
    assert len(rows) == len(FILE_ROWS | TRAINING_ROWS)
    assert [row for row in rows if not positive(row)] == []
    text = (tmp_path / "f.md").read_text()
    assert all(f"| {row['what']} | {row['against']} | " in text for row in rows)
    assert text in done.stdout
    assert not list(tmp_path.glob("secvec-speed-*"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    prepare(folder, TINY.shape, torch.float32)
    return folder


def losses(folder: Path, method: str, way: str) -> list[float]:
    """Return the loss before and after two steps."""
    ids = TINY.ids(0)
    with trainee(folder, method, way) as trained:
        before = float(trained.model(input_ids=ids, labels=ids).loss.detach())
        assert trained.step(ids) > 0
        assert trained.step(ids) > 0
        return [before, float(trained.model(input_ids=ids, labels=ids).loss.detach())]


@pytest.mark.parametrize("method", METHODS)
def test_all_ways_but_plain_have_the_vector_in_effect_and_learn_alike(prepared: Path, method: str) -> None:
    found = {way: losses(prepared, method, way) for way in WAYS}
    for way in ("hooked", "PEFT"):
        assert found[way][0] == pytest.approx(found["folded"][0], rel=1e-6), way
        # LoRA starts at random: after two steps two models are alike, not the same.
        assert found[way][1] == pytest.approx(found["folded"][1], rel=1e-4), way
    assert abs(found["plain"][0] - found["folded"][0]) > 1e-4 * found["plain"][0]
    assert all(after < before for before, after in found.values())


@pytest.mark.parametrize("method", METHODS)
def test_all_ways_train_as_many_numbers_and_never_the_vector(prepared: Path, method: str) -> None:
    counts: dict[str, int] = {}
    for way in WAYS:
        with trainee(prepared, method, way) as trained:
            trainable = {name: p for name, p in trained.model.named_parameters() if p.requires_grad}
            assert not [name for name in trainable if ".vector." in name]
            assert len(trained.optimizer.param_groups[0]["params"]) == len(trainable)
            counts[way] = sum(p.numel() for p in trainable.values())
    assert len(set(counts.values())) == 1, counts


def test_the_interval_of_a_ratio_pairs_the_rounds() -> None:
    slow_and_quick_rounds = [1.0, 9.0, 2.0, 7.0, 3.0] * 4
    row = step_row("a", [1.1 * s for s in slow_and_quick_rounds], "b", slow_and_quick_rounds)
    assert (row["ratio"], row["ratio_ci95"]) == (1.1, [1.1, 1.1])
