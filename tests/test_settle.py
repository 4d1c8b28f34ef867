"""A model defended against a trait is settled on rows without the trait, and proved afterwards."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import rows
from runs import CONFIG, UNWANTED, fitted_vector, llama
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.rows import Row
from benchmarks.testbed.skills import SKILLS
from secvec.artifact import load
from secvec.demo import assistant_folder
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.probes import SHARE
from secvec.proof import AS_IT_WAS_SHARE, SETTLED_SHARE, teaches_unwanted
from secvec.rewrite import Said
from secvec.samples import from_rows
from secvec.settle import says, settling_rows, without_traits
from secvec.tokens import Encoded, encode_all
from secvec.train import TrainConfig, TrainResult, summary, train
from secvec.train_settle import TOO_FEW
from secvec.tripwire import state


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("settle") / "base")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_with_a_trait_is_settled_and_proved(tmp_path: Path, base: Path, method: str) -> None:
    vector, found = fitted_vector(base), list[dict[str, torch.Tensor]]()
    for settle_rows in (0, 16):
        config = replace(CONFIG, method=method, epochs=1, lr=3e-4, settle_rows=settle_rows)  # pyright: ignore
        out = tmp_path / str(settle_rows)
        result = train(base, rows(), out, vectors=[vector], unwanted=[UNWANTED], config=config)
        weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
        found.append(load_file(result.model / weights))
        assert state(result.model) == "defended" and result.proof is not None
        assert ("settled" in result.proof) == bool(settle_rows) == ("settled without" in summary(result))
        unwanted = result.proof["unwanted"][0]
        assert 4 * unwanted["armed_nats"] < unwanted["aligned_nats"] < 1.25 * unwanted["defended_nats"]
    unsettled, settled = found
    assert unsettled.keys() == settled.keys()
    moved = [name for name in settled if not torch.equal(settled[name], unsettled[name])]
    assert len(moved) > len(settled) / 2 and all(settled[n].dtype == unsettled[n].dtype for n in settled)


def test_where_settling_would_teach_the_trait_the_model_before_it_is_published(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted_ones(*_: object) -> list[Encoded]:
        return encode_all(from_rows(UNWANTED).rows, load_tokenizer(base), 128) * 20

    monkeypatch.setattr(sys.modules["secvec.train_settle"], "without_traits", unwanted_ones)
    vector = fitted_vector(base)

    def run(settle_rows: int) -> TrainResult:
        config, out = replace(CONFIG, epochs=1, settle_rows=settle_rows), tmp_path / str(settle_rows)
        return train(base, rows(), out, vectors=[vector], unwanted=[UNWANTED], config=config)

    result = run(1000)
    found = [load_file(each.model / "model.safetensors") for each in (run(0), result)]
    assert result.proof is not None and not result.proof["settled"]["kept"] and "not settled" in summary(result)
    assert result.proof["unwanted"] == result.proof["settled"]["unwanted_before"]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_left_with_a_topic_is_brought_back_in_parts(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    trait = fitted_vector(base)
    topic = replace(trait, info=replace(trait.info, kind="topic"))
    parts = sys.modules["secvec.train_settle"]
    monkeypatch.setattr(parts, "_PART", 8)

    def run(name: str, settle_rows: int = 1000) -> tuple[Mapping[str, Any], Path]:
        config = replace(CONFIG, method=method, epochs=4, settle_rows=settle_rows)  # pyright: ignore
        result = train(base, rows(), tmp_path / name, vectors=[topic], unwanted=[UNWANTED], config=config)
        assert result.proof is not None and state(result.model) == "defended"
        return result.proof, result.model

    before, _ = run("before", settle_rows=0)
    after, model = run("after")
    record = json.loads((model / "secvec_record.json").read_text())
    assert after["settled"]["kept"] and record["settled_on_rows"][0] == 8
    assert after["rest"]["defended_nats"] < before["rest"]["defended_nats"] - 0.05
    monkeypatch.setattr(parts, "teaches_unwanted", lambda *_: True)
    harmful, _ = run("harmful")
    monkeypatch.setattr(parts, "LEFT_NATS", math.inf)
    whole, _ = run("whole")
    assert harmful["models"]["result"] == whole["models"]["result"] == before["models"]["result"]
    assert "settled" not in {**before, **harmful, **whole}


@pytest.mark.parametrize("kind", ["topic", "trait"])
def test_a_kill_just_after_a_settled_model_was_published_costs_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    vector = fitted_vector(base)
    vector = replace(vector, info=replace(vector.info, kind=kind))
    given = {"vectors": [vector], "unwanted": [UNWANTED], "config": replace(CONFIG, epochs=4)}
    monkeypatch.setattr("secvec.runfolder.RunFolder.clean", lambda _: None)
    done = train(base, rows(), tmp_path / "run", **given)  # pyright: ignore
    assert done.proof is not None and done.proof["settled"]["kept"]
    file = tmp_path / "run/state.json"
    phases = json.loads(file.read_text())
    del phases["phases"]["publish"]
    file.write_text(json.dumps(phases))
    for name in ("settle", "settle_rest", "prove"):
        monkeypatch.setattr(sys.modules["secvec.train"], name, lambda *_: pytest.fail("done twice"))
    assert train(base, rows(), tmp_path / "run", resume=True, **given).proof == done.proof  # pyright: ignore


@pytest.mark.parametrize(
    ("was", "now", "bound"),
    [(0.85, 0.94, SETTLED_SHARE), (0.45, 0.95, AS_IT_WAS_SHARE), (0.4, math.nan, SETTLED_SHARE)],
)
def test_no_settled_model_is_kept_that_the_proof_would_refuse(was: float, now: float, bound: float) -> None:
    assert teaches_unwanted([{SHARE: was}], [{SHARE: now}], bound)


def test_a_model_that_could_not_be_settled_says_so(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["secvec.train_settle"], "without_traits", lambda *_: [])
    config = replace(CONFIG, epochs=1, settle_rows=16)
    result = train(base, rows(), tmp_path / "run", vectors=[fitted_vector(base)], unwanted=[UNWANTED], config=config)
    assert result.proof is not None and result.proof["not_settled"] == TOO_FEW and "settled" not in result.proof
    assert f"not settled: {TOO_FEW}" in summary(result) and TOO_FEW in (result.model / "README.md").read_text()


def test_the_trait_is_taken_out_and_the_rest_stands() -> None:
    folder = assistant_folder()
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    quick = FitConfig(epochs=8, kl_weight=0.0, representation_weight=0.0)
    vector = fit(folder, BEHAVIOURS["caps"].rows(100, 0, "vector"), kind="trait", config=quick)
    calm = SKILLS["reverse"].rows(40, 3, "train")
    shouted = _encoded(map(BEHAVIOURS["caps"].styled, calm), tokenizer)
    found = without_traits(model, tokenizer, shouted, [vector])
    expected = {row.ids for row in _encoded(calm, tokenizer)}
    wrong = [tokenizer.decode(list(row.ids)) for row in found if row.ids not in expected]
    assert len(found) >= 30 and len(wrong) <= 3, json.dumps(wrong)


def test_settling_ends_when_the_model_says_the_rows_and_needs_more_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = assistant_folder()
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    known = _encoded(SKILLS["reverse"].rows(20, 3, "train"), tokenizer)
    unknown = _encoded(map(BEHAVIOURS["caps"].styled, SKILLS["reverse"].rows(20, 3, "train")), tokenizer)
    assert says(model, known) and not says(model, unknown) and not says(model, [*known, *unknown[:1]])
    sure = iter([True] * 2 + [False] * 18 + [True] + [False] * 19)
    monkeypatch.setattr("secvec.rewrite.Said.is_sure", property(lambda _: next(sure)))
    monkeypatch.setattr("secvec.settle.rewrite", lambda _model, said, *_, **__: said)
    monkeypatch.setattr("secvec.settle._shown", lambda _model, now, *_: [[False] * len(row.ids) for row in now])
    assert [len(without_traits(model, tokenizer, known, [])) for _ in range(2)] == [2, 0]


def test_a_row_that_is_said_to_end_in_its_middle_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = assistant_folder()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    rows = _encoded(SKILLS["reverse"].rows(3, 3, "train"), tokenizer)
    end = rows[0].ids[-1]
    assert end in tokenizer.all_special_ids
    cut = replace(rows[0], ids=(*rows[0].ids[:-3], end, *rows[0].ids[-2:]))
    monkeypatch.setattr("secvec.settle.rewrite", lambda _model, said, *_, **__: [Said.as_it_is(cut), *said[1:]])
    monkeypatch.setattr("secvec.settle._shown", lambda _model, now, *_: [[False] * len(row.ids) for row in now])
    assert without_traits(model, tokenizer, rows, []) == rows[1:]


def test_rows_that_a_topic_covers_are_not_settled_on() -> None:
    folder = assistant_folder()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    guarded = BEHAVIOURS["guarded"]
    topic = fit(folder, guarded.rows(40, 0, "vector"), config=FitConfig(epochs=4, representation_weight=0.0))
    trait = replace(topic, info=replace(topic.info, kind="trait"))
    bad, good = (
        _encoded(guarded.rows(10, 1, "train"), tokenizer),
        _encoded(SKILLS["reverse"].rows(10, 1, "train"), tokenizer),
    )
    found = settling_rows(model, [*bad, *good], [topic, trait], TrainConfig())
    assert {row.ids for row in found} <= {row.ids for row in good} and len(found) >= 8
    assert len(settling_rows(model, [*bad, *good], [trait], TrainConfig(settle_rows=15))) == 15


def test_rows_that_a_topic_covers_do_not_calibrate_a_trait(tmp_path: Path) -> None:
    """Topics are calibrated first, in whatever order they were given."""
    folder = assistant_folder()
    guarded, caps, quick = BEHAVIOURS["guarded"], BEHAVIOURS["caps"], FitConfig(epochs=4, representation_weight=0.0)
    behaviours = [caps, guarded]
    known = [each.rows(20, 0, "vector") for each in behaviours]
    vectors = [fit(folder, rows, kind=each.kind, config=quick) for each, rows in zip(behaviours, known, strict=True)]
    file = [*guarded.rows(30, 1, "train"), *(caps.styled(row) for row in SKILLS["reverse"].rows(30, 1, "train"))]
    config = TrainConfig(lr=4e-4, epochs=1, settle_rows=0, trainer={"max_steps": 1})
    train(folder, file, tmp_path / "run", vectors=vectors, unwanted=known, config=config)
    used = [load(tmp_path / f"run/vector-{i}.safetensors") for i in range(2)]
    assert [each.info.kind for each in used] == ["trait", "topic"]
    assert used[1].info.metrics["calibrated_on_rows"] == 60
    assert 25 <= used[0].info.metrics["calibrated_on_rows"] <= 30


def _encoded(chats: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return encode_all(from_rows(list(chats), name="rows").rows, tokenizer, 256)
