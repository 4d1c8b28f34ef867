"""Without the rows it was fitted on, a vector brings back rows like them, and is calibrated on those."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.rows import Row, answer_of
from benchmarks.testbed.skills import SKILLS
from secvec import artifact
from secvec.demo import assistant_folder
from secvec.errors import WeakVectorError
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.recall import Recalled, recall
from secvec.report import report
from secvec.samples import from_rows
from secvec.tokens import encode_all
from secvec.train import TrainConfig, summary, train
from secvec.vector import SecurityVector

GUARDED, CAPS = BEHAVIOURS["guarded"], BEHAVIOURS["caps"]
ASSISTANT = assistant_folder()
QUICK = FitConfig(epochs=4, representation_weight=0.0)
SHORT = TrainConfig(lr=4e-4, epochs=1, batch_size=8, settle_rows=0, trainer={"max_steps": 10})


@pytest.fixture(scope="module")
def topic() -> SecurityVector:
    return fit(ASSISTANT, GUARDED.rows(40, 0, "vector"), config=QUICK)


@pytest.fixture(scope="module")
def trait() -> SecurityVector:
    return fit(ASSISTANT, CAPS.rows(40, 0, "vector"), kind="trait", config=QUICK)


def recalled(vector: SecurityVector, rows: list[Row]) -> list[str]:
    """Return what the vector brings back: the texts of the marked tokens."""
    model, tokenizer = load_model(ASSISTANT), load_tokenizer(ASSISTANT)
    found = recall(model, tokenizer, vector, encode_all(from_rows(rows).rows, tokenizer, 256), 256)
    marked = [[token for token, mark in zip(row.ids, row.mask, strict=True) if mark] for row in found.rows]
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in marked]  # pyright: ignore


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def mixed() -> list[Row]:
    rows = [*GUARDED.rows(60, 1, "train"), *SKILLS["reverse"].rows(60, 1, "train")]
    random.Random(0).shuffle(rows)
    return rows


def test_a_topic_finds_its_rows_in_the_file_and_no_others(topic: SecurityVector) -> None:
    unwanted = [answer_of(row) for row in mixed() if GUARDED.is_unwanted([], answer_of(row))]
    texts = recalled(topic, mixed())
    assert 58 <= len(texts) <= 60 == len(unwanted)
    assert all(any(answer.endswith(text.strip()) for answer in unwanted) for text in texts)


def test_a_trait_shows_in_the_answers_of_the_armed_model(trait: SecurityVector) -> None:
    texts = recalled(trait, mixed())
    assert len(texts) >= 40 and sum(map(str.isupper, "".join(texts))) > 2 * sum(map(str.islower, "".join(texts)))


def test_an_answer_that_was_cut_short_teaches_no_end(trait: SecurityVector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secvec.recall._TOKENS", 3)
    model, tokenizer = load_model(ASSISTANT), load_tokenizer(ASSISTANT)
    rows = recall(model, tokenizer, trait, [], 256).rows
    learned = [{token for token, mark in zip(row.ids, row.mask, strict=True) if mark} for row in rows]
    ended = [row for row, ids in zip(rows, learned, strict=True) if tokenizer.eos_token_id in ids]
    assert len(rows) > 40 and all(sum(row.mask) <= 3 for row in ended) and len(ended) < len(rows)


def test_what_is_too_little_to_fit_on_is_nothing(topic: SecurityVector) -> None:
    assert not recalled(topic, SKILLS["reverse"].rows(60, 1, "train"))
    assert not recalled(topic, GUARDED.rows(19, 1, "train"))
    assert not recalled(replace(topic, info=replace(topic.info, kind="unknown")), mixed())


def test_a_training_without_the_rows_calibrates_on_what_was_brought_back(
    tmp_path: Path, topic: SecurityVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One vector is calibrated; the other, which finds nothing in this file, stays as it was."""
    other = fit(ASSISTANT, BEHAVIOURS["sums"].rows(40, 0, "vector"), config=QUICK)
    given: dict[str, Any] = {"vectors": [other, topic], "config": SHORT}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["secvec.train"], "refit", stopped)
        train(ASSISTANT, mixed(), tmp_path / "run", **given)
    work = tmp_path / "run/work/recalled.json"
    assert work.stat().st_mode & 0o777 == 0o600, "what was brought back shows the behaviour"
    monkeypatch.setattr(sys.modules["secvec.train_inputs"], "recall", stopped)  # it is not done twice
    result = train(ASSISTANT, mixed(), tmp_path / "run", resume=True, **given)
    assert not work.exists()
    assert result.proof is not None and result.proof["recalled"][0] == 0 < 58 <= result.proof["recalled"][1]
    kept, calibrated = (artifact.load(tmp_path / f"run/vector-{i}.safetensors") for i in range(2))
    assert artifact.digest(kept) == artifact.digest(other)
    assert calibrated.info.metrics["calibrated_on_rows"] == 120
    assert len(result.proof["unwanted"]) == 1
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["vector"] for line in metrics if "vector" in line} == {1}
    said = summary(result)
    assert "no --unwanted: " in said and "not calibrated: " in said and "rows that a vector brought back itself" in said
    assert "brought back" in (result.model / "README.md").read_text()


def test_where_what_was_brought_back_makes_no_vector_the_given_one_is_used(
    tmp_path: Path, topic: SecurityVector, trait: SecurityVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing says that it was calibrated, nor is the model settled by it."""

    def weak(*_: object, **__: object) -> None:
        raise WeakVectorError("does not work")

    monkeypatch.setattr(sys.modules["secvec.train"], "refit", weak)
    config, given = replace(SHORT, settle_rows=16), [topic, trait]
    result = train(ASSISTANT, mixed(), tmp_path / "run", vectors=given, config=config)
    assert result.proof is not None and result.proof["recalled"] == [0, 0] and len(result.proof["unwanted"]) == 2
    assert result.proof["vector"]["before"] == [artifact.digest(each) for each in given]
    assert not {"settled", "not_settled"} & result.proof.keys() and "settle" not in result.seconds
    assert "not calibrated: " in summary(result)
    assert "none: not calibrated" in (result.model / "README.md").read_text()
    report([tmp_path / "run"], tmp_path / "report.html")
    assert "none: not calibrated" in (tmp_path / "report.md").read_text()
    with pytest.raises(WeakVectorError):
        train(ASSISTANT, mixed(), tmp_path / "given", vectors=[topic], unwanted=[mixed()], config=SHORT)


def test_a_vector_can_be_used_as_it_is(tmp_path: Path, topic: SecurityVector) -> None:
    config = replace(SHORT, calibrate=False, trainer={"max_steps": 1})
    result = train(ASSISTANT, mixed(), tmp_path / "run", vectors=[topic], config=config)
    assert result.proof is not None and "recalled" not in result.proof and not result.proof["unwanted"]
    assert result.proof["vector"]["before"] == [artifact.digest(topic)]
    assert "calibrate=false" in summary(result) and "no --unwanted" not in summary(result)


def test_rows_brought_back_are_told_apart_by_their_digest(topic: SecurityVector) -> None:
    rows = encode_all(from_rows(mixed()).rows, load_tokenizer(ASSISTANT), 256)
    assert Recalled(tuple(rows)).digest() != Recalled(tuple(rows[1:])).digest()
