"""Covered rows that are more than the others are left out of a training, and it says so."""

import json
import math
import random
import sys
from pathlib import Path

import pytest

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.skills import SKILLS
from secvec.demo import assistant_folder
from secvec.errors import CheckpointError
from secvec.factors import FitConfig
from secvec.fit import fit
from secvec.train import TrainConfig, TrainResult, summary, train
from secvec.vector import SecurityVector

UNWANTED, WANTED, LEAST, BATCH = 60, 12, 10, 8
GUARDED = BEHAVIOURS["guarded"]
KNOWN = GUARDED.rows(40, 0, "vector")
CONFIG = TrainConfig(lr=4e-4, epochs=1, batch_size=BATCH)


@pytest.fixture(scope="module")
def vector() -> SecurityVector:
    return fit(assistant_folder(), KNOWN, config=FitConfig(epochs=4, representation_weight=0.0))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secvec.excess.LEAST", LEAST)


def trained(out: Path, vector: SecurityVector, unwanted: int, wanted: int, *, resume: bool = False) -> TrainResult:
    rows = [*GUARDED.rows(unwanted, 1, "train"), *SKILLS["reverse"].rows(wanted, 1, "train")]
    random.Random(0).shuffle(rows)
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(assistant_folder(), file, out, vectors=[vector], unwanted=[KNOWN], config=CONFIG, resume=resume)


def test_as_many_covered_rows_as_others_are_trained_on(tmp_path: Path, vector: SecurityVector) -> None:
    result = trained(tmp_path / "run", vector, UNWANTED, WANTED)
    lines = [json.loads(line) for line in (tmp_path / "run/left-out.jsonl").read_text().splitlines()]
    rows = (tmp_path / "run.jsonl").read_text().splitlines()
    unwanted = {json.dumps(row) for row in GUARDED.rows(UNWANTED, 1, "train")}
    assert {rows[line["row"]] for line in lines} <= unwanted and all(line["line"] == line["row"] + 1 for line in lines)
    # One or two unwanted rows may be none that the vector covers.
    stayed = len(rows) - len(lines)
    assert 2 * WANTED <= stayed <= 2 * (WANTED + 2)
    assert result.proof is not None and result.proof["left_out"] == {"covered_rows": len(lines), "rows": len(rows)}
    assert f"not trained on: {len(lines)} of {len(rows)} rows" in summary(result)
    assert f"| rows in excess that the vector covers, not trained on | {len(lines)} |" in _card(result)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == math.ceil(stayed / BATCH)


def test_none_are_looked_for_where_they_are_few(tmp_path: Path, vector: SecurityVector) -> None:
    result = trained(tmp_path / "run", vector, WANTED, UNWANTED)
    assert not (tmp_path / "run/left-out.jsonl").exists() and "leave out" not in result.seconds
    assert result.proof is not None and "left_out" not in result.proof and "in excess" not in _card(result)


def test_a_list_that_was_altered_is_refused(
    tmp_path: Path, vector: SecurityVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sys.modules["secvec.train"], "run_trainer", stopped)
        trained(tmp_path / "run", vector, UNWANTED, WANTED)
    (tmp_path / "run/left-out.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="what phase 'leave out' wrote was altered"):
        trained(tmp_path / "run", vector, UNWANTED, WANTED, resume=True)


def _card(result: TrainResult) -> str:
    return (result.model / "README.md").read_text()
