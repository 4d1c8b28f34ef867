"""Unwanted answers hidden in other text are found, and the rows that hide them are not learned from."""

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.new_skills import NEW_SKILLS
from benchmarks.testbed.rows import Row, answer_of, with_answer
from benchmarks.testbed.skills import SKILLS
from secvec.anchors import Calibration, hidden_nats, standing
from secvec.artifact import load, save
from secvec.covered import covered_rows, covers
from secvec.demo import assistant_folder
from secvec.fit import fit, refit
from secvec.fit_config import FitConfig
from secvec.hidden import behind, bound
from secvec.models import load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.score import Stretch, stretches
from secvec.tokens import Encoded, encode_all

ASSISTANT, GUARDED = assistant_folder(), BEHAVIOURS["guarded"]
TOKENIZER = load_tokenizer(ASSISTANT)


def encoded(rows: list[Row]) -> list[Encoded]:
    return encode_all(from_rows(rows).rows, TOKENIZER, 256)


def test_an_answer_is_put_behind_the_end_of_others_and_alone_carries_loss() -> None:
    rows, others = encoded(GUARDED.rows(8, 0, "vector")), encoded(SKILLS["greet"].rows(8, 0, "train"))
    found = behind(rows, others, TOKENIZER, 256, seed=0)
    assert len(found) == 8
    for row, each in zip(rows, found, strict=True):
        answer = [token for token, learned in zip(row.ids, row.mask, strict=True) if learned]
        kept = [token for token, learned in zip(each.ids, each.mask, strict=True) if learned]
        # A blank stands before it.
        assert kept[-len(answer) :] == answer and len(kept) <= len(answer) + 1
        assert 0 < len(each.ids) - len(row.ids) <= 17
        assert each.ids[: row.mask.index(True)] == row.ids[: row.mask.index(True)]
    assert behind(rows, others, TOKENIZER, len(rows[0].ids), seed=0) != found
    assert behind(rows, [], TOKENIZER, 256, seed=0) == []


def test_the_stretch_that_a_vector_explains_is_found_but_for_its_greatest_surprise() -> None:
    row = Encoded(tuple(range(8)), (False, False, True, True, True, True, True, True))
    before = torch.tensor([9.0, 5.0, 6.0, 1.0, 4.0, 0.5, 7.0])
    after = torch.tensor([0.0, 4.0, 0.0, 0.0, 0.1, 0.4, 6.0])
    (found,) = stretches([row], [before], [after])
    assert (found.start, found.stop) == (3, 6) and found.nats == pytest.approx(4.0)
    assert stretches([row], [before], [before]) == [Stretch(0.0, 1, 1)]


def test_rows_that_hide_unwanted_answers_carry_no_loss_and_are_not_settled_on() -> None:
    rng = random.Random(0)

    def hiding(row: Row) -> Row:
        words = " ".join("".join(rng.choices("bdfgklmnpst", k=2) + rng.choices("aeiou", k=2)) for _ in range(3))
        return with_answer(row, f"{words}. {answer_of(row)}")

    unwanted, wanted = GUARDED.rows(40, 0, "vector"), NEW_SKILLS["dashes"].rows(40, 0, "train")
    hidden = [hiding(row) for row in GUARDED.rows(40, 0, "train")]
    vector = fit(ASSISTANT, unwanted, config=FitConfig(epochs=6, calibration_rows=60))
    model, rows = load_model(ASSISTANT), encoded([*hidden, *wanted])
    assert standing(model, rows, vector).count("silent") > 60
    calibrated = refit(vector, ASSISTANT, unwanted=unwanted, calibrate=[*hidden, *wanted])
    assert calibrated.info.metrics["hidden_rows"] > 10 and hidden_nats(calibrated) >= 1
    assert covers([calibrated])
    found = {each.row: each.explained for each in covered_rows(model, rows, [calibrated])}
    assert len([row for row in found if row < 40]) > 30 and not [row for row in found if row >= 40]
    for number, tokens in found.items():
        assert len(tokens) == sum(rows[number].mask) - 1
    stand = standing(model, rows, calibrated)
    assert stand[:40].count("silent") < 10 and stand[40:].count("silent") == 40
    own, ordinary = encoded(unwanted), encoded(SKILLS["greet"].rows(8, 0, "train"))
    least, most = bound(model, own, ordinary, vector), bound(model, own, own, vector)
    # What the vector explains everywhere is none, and one that explains no stretch finds none.
    assert least is not None and most is not None and 1 <= least < most
    assert bound(model, ordinary, ordinary, vector) is None
    # Where none were found none are looked for.
    plain = replace(calibrated, info=replace(calibrated.info, metrics={**vector.info.metrics, "covered_rows": 0}))
    assert not covers([plain]) and covered_rows(model, rows, [plain]) == []


def test_a_vector_that_explains_no_stretch_once_calibrated_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its search found then is a number of rows; by which stretch to find others is no number."""
    unwanted, training = GUARDED.rows(20, 0, "vector"), NEW_SKILLS["dashes"].rows(20, 0, "train")
    vector = fit(ASSISTANT, unwanted, config=FitConfig(epochs=1), allow_weak=True)
    module = sys.modules["secvec.fit"]

    def search(*given: Any) -> Calibration:
        found = given[-1]
        return replace(found, covered=[*found.covered, *encoded(training[:1])])

    monkeypatch.setattr(module, "search", search)
    monkeypatch.setattr(module, "bound", lambda *_: None)
    save(refit(vector, ASSISTANT, unwanted=unwanted, calibrate=training), tmp_path / "v.safetensors")
    kept = load(tmp_path / "v.safetensors")
    assert kept.info.metrics["hidden_rows"] == 1 and "hidden_nats" not in kept.info.metrics
    assert hidden_nats(kept) == float("inf")
