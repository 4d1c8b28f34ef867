"""What the disarmed model learns is measured while it trains, changes nothing, and can stop or slow the training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import rows
from runs import CONFIG, UNWANTED, fitted_vector, llama
from safetensors.torch import load_file

from secvec.drift import POINTS, Watch
from secvec.drift_record import BOUND, drift_of
from secvec.errors import UsageError
from secvec.fold import fold
from secvec.models import load_model, load_tokenizer
from secvec.probes import Probe
from secvec.samples import from_rows
from secvec.tokens import encode_all
from secvec.train import TrainConfig, summary, train
from secvec.trainer import Job
from secvec.trainer import run as run_trainer
from secvec.vector import SecurityVector


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("drift") / "base")


@pytest.fixture(scope="module")
def vector(base: Path) -> SecurityVector:
    return fitted_vector(base)


def trained(
    folder: Path, base: Path, vector: SecurityVector, watch: Watch | None, *, save_every: int = 500
) -> list[dict[str, Any]]:
    """Train on unwanted rows alone, and return the metrics."""
    fold(base, [vector], folder / "folded")
    tokenizer = load_tokenizer(base)
    bad = encode_all(from_rows(UNWANTED).rows, tokenizer, 128) * 10
    paths = folder / "checkpoints", folder / "trained", folder / "metrics.jsonl"
    config = replace(CONFIG, lr=1e-2, save_every=save_every, trainer={"logging_steps": 1})
    run_trainer(Job(folder / "folded", bad, tokenizer, config, *paths, watch=watch), None)
    return [json.loads(line) for line in paths[2].read_text().splitlines()]


def watch(base: Path, vector: SecurityVector, action: Any) -> Watch:
    unwanted = encode_all(from_rows(UNWANTED).rows, load_tokenizer(base), 128)
    return Watch({0: Probe.of(load_model(base), unwanted, vector)}, [vector], action)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_measured_is_what_is_left_when_the_vector_is_out(
    tmp_path: Path, base: Path, method: str, vector: SecurityVector
) -> None:
    config = replace(CONFIG, method=method, settle_rows=0)  # pyright: ignore
    result = train(base, rows(), tmp_path / "run", vectors=[vector], unwanted=[UNWANTED], config=config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "unwanted_share" in line]
    assert result.proof is not None and len(seen) == result.proof["drift"]["measurements"] >= POINTS
    [probe] = result.proof["unwanted"]
    assert seen[-1]["unwanted_disarmed_nats"] == pytest.approx(probe["defended_nats"], rel=1e-3)
    assert seen[0]["unwanted_aligned_nats"] == pytest.approx(probe["aligned_nats"], rel=1e-3)
    assert seen[-1]["unwanted_armed_nats"] < probe["aligned_nats"] / 2
    assert result.proof["drift"]["largest_share"] == max(line["unwanted_share"] for line in seen) < BOUND
    assert "while training, without the vector, it went at most" in summary(result)


def test_measuring_changes_nothing(tmp_path: Path, base: Path, vector: SecurityVector) -> None:
    for name, watched in (("with", watch(base, vector, "note")), ("without", None)):
        trained(tmp_path / name, base, vector, watched)
    one, other = (load_file(tmp_path / name / "trained/model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("action", ["note", "stop", "slow"])
def test_a_training_that_goes_past_its_vector(tmp_path: Path, base: Path, vector: SecurityVector, action: str) -> None:
    faint = replace(vector, scale=0.1 * vector.scale)
    lines = trained(tmp_path, base, faint, watch(base, faint, action))
    found = drift_of(tmp_path / "metrics.jsonl")
    assert found["largest_share"] > BOUND
    steps = max(line["step"] for line in lines)
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    acted = found["acted_at_step"]
    assert (acted is None) == (action == "note")
    if action == "note":
        assert steps == 40
    elif action == "stop":
        assert steps == acted < 40
    else:
        assert steps == 40 and rates[acted + 2] < 0.11 * rates[acted]
        assert sum("drift" in line for line in lines) == 1


def test_a_stop_is_not_undone_by_going_on(tmp_path: Path, base: Path, vector: SecurityVector) -> None:
    faint = replace(vector, scale=0.1 * vector.scale)
    lines = trained(tmp_path, base, faint, watch(base, faint, "stop"), save_every=1)
    first = load_file(tmp_path / "trained/model.safetensors")
    # Killed after the last step and before the end: what was saved is there, what was trained is not.
    shutil.rmtree(tmp_path / "trained")
    shutil.rmtree(tmp_path / "folded")
    again = trained(tmp_path, base, faint, watch(base, faint, "stop"), save_every=1)
    assert [line["step"] for line in again if "drift" in line] == [line["step"] for line in lines if "drift" in line]
    assert max(line["step"] for line in again) == max(line["step"] for line in lines) < 40
    second = load_file(tmp_path / "trained/model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_action_that_could_never_be_taken_is_refused(tmp_path: Path, base: Path, vector: SecurityVector) -> None:
    config = TrainConfig(on_drift="stop")
    with pytest.raises(UsageError, match="on_drift: 'stop' needs the unwanted rows to see any drift"):
        train(base, rows(), tmp_path / "run", vectors=[vector], config=config)
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_sets_its_own_step_size_cannot_be_slowed(tmp_path: Path, base: Path) -> None:
    config = TrainConfig(on_drift="slow", trainer={"lr_scheduler_type": "reduce_lr_on_plateau"})
    with pytest.raises(UsageError, match="on_drift: 'slow' cannot change the step size"):
        train(base, rows(), tmp_path / "run", config=config)
    with pytest.raises(UsageError, match="on_drift: expected one of note, stop, slow"):
        TrainConfig(on_drift="refresh")  # pyright: ignore
