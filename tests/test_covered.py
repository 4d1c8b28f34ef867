"""What a topic's vector covers in a training file is not trained on, and the run says what that was."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.rows import Row
from benchmarks.testbed.skills import SKILLS
from secvec.anchors import standings
from secvec.covered import read_covered, trained_rows
from secvec.demo import assistant_folder
from secvec.errors import CheckpointError
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_tokenizer
from secvec.rest import kept_line
from secvec.samples import from_rows
from secvec.tokens import Encoded, encode_all
from secvec.train import TrainConfig, TrainResult, summary, train
from secvec.vector import SecurityVector

UNWANTED, WANTED, LEAST, BATCH = 60, 12, 10, 8
GUARDED = BEHAVIOURS["guarded"]
KNOWN = GUARDED.rows(40, 0, "vector")
CONFIG = TrainConfig(lr=4e-4, epochs=1, batch_size=BATCH, rehearse=0.4)


@pytest.fixture(scope="module")
def vector() -> SecurityVector:
    return fit(assistant_folder(), KNOWN, config=FitConfig(epochs=4, representation_weight=0.0))


def mixed(unwanted: int, wanted: int) -> list[Row]:
    rows = [*GUARDED.rows(unwanted, 1, "train"), *SKILLS["reverse"].rows(wanted, 1, "train")]
    random.Random(0).shuffle(rows)
    return rows


def trained(out: Path, vector: SecurityVector, rows: list[Row], *, resume: bool = False) -> TrainResult:
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(assistant_folder(), file, out, vectors=[vector], unwanted=[KNOWN], config=CONFIG, resume=resume)


@pytest.mark.parametrize("sure", [True, False])
def test_covered_rows_teach_nothing_that_the_vector_explains_and_those_in_excess_nothing_at_all(
    tmp_path: Path, vector: SecurityVector, monkeypatch: pytest.MonkeyPatch, sure: bool
) -> None:
    monkeypatch.setattr("secvec.covered.LEAST", LEAST)
    monkeypatch.setattr("secvec.covered._IN_PART_SHARE", 1.0 if sure else -1.0)
    rows, unwanted = mixed(UNWANTED, WANTED), GUARDED.rows(UNWANTED, 1, "train")
    result = trained(tmp_path / "run", vector, rows)
    covered = read_covered(tmp_path / "run/covered.jsonl")
    replaced = [each.row for each in covered if each.replaced]
    # One or two unwanted rows may be none that the vector covers; no wanted one is.
    assert all(rows[each.row] in unwanted for each in covered) and len(covered) >= UNWANTED - 2
    encoded = encode_all(from_rows(rows).rows, load_tokenizer(assistant_folder()), 256)
    made_up = [Encoded((0, 1), (False, True))] * 2
    taught = trained_rows(encoded, covered, made_up)
    assert 2 * WANTED <= len(taught) <= 2 * (WANTED + 2)
    assert taught.count(made_up[0]) == len(replaced)
    assert len(replaced) == (round(0.4 * (len(rows) - len(covered))) if sure else 0)
    gone = {each.row for each in covered if each.left_out or each.replaced}
    own, kept = [row for row in taught if row not in made_up], [row for i, row in enumerate(encoded) if i not in gone]
    assert [row.ids for row in own] == [row.ids for row in kept]
    lost = sum(len(each.explained) for each in covered if each.row not in gone)
    assert sum(map(sum, (row.mask for row in own))) == sum(map(sum, (row.mask for row in kept))) - lost
    assert (lost > 0) == sure
    assert all(any(row.mask) for row in taught)
    left_out = len(rows) - len(taught)
    assert result.proof is not None
    assert result.proof["covered"] == {
        "rows": len(rows),
        "covered_rows": len(covered),
        "left_out_rows": left_out,
        "replaced_rows": len(replaced),
        "conversations": len(replaced),
        "tokens_without_loss": lost,
    }
    assert f"{left_out} of them not trained on" in summary(result)
    made = f"{len(replaced)} replaced by {len(replaced)} conversations that the model made up"
    assert (made in summary(result)) == sure
    rest = result.proof["rest"]
    assert WANTED <= rest["rows"] <= len(rows) - len(covered)
    # They show a skill that the model had.
    assert max(rest["aligned_nats"], rest["trained_nats"], rest["defended_nats"]) < 0.01
    assert kept_line(rest) in summary(result)
    card = (result.model / "README.md").read_text()
    assert f"| rows that the vector covers | {len(covered)} of {len(rows)} |" in card
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == math.ceil(len(taught) / BATCH)


def test_a_list_of_covered_rows_that_was_altered_is_refused(
    tmp_path: Path, vector: SecurityVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    rows = mixed(20, 20)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sys.modules["secvec.train"], "run_trainer", stopped)
        trained(tmp_path / "run", vector, rows)
    lines = (tmp_path / "run/covered.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [json.loads(line)["row"] + 1 for line in lines]
    (tmp_path / "run/covered.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="what phase 'cover' wrote was altered"):
        trained(tmp_path / "run", vector, rows, resume=True)


def test_a_row_without_any_loss_blinds_nothing() -> None:
    rows = [Encoded((5, 6), (False, True))] * 3
    before, after = (
        [torch.tensor([nats]) for nats in (4.0, 4.0, 0.0)],
        [torch.tensor([nats]) for nats in (0.1, 4.0, 1e-7)],
    )
    assert standings(rows, before, after) == ["covered", "silent", "silent"]
