"""Each failure of the method is named, and told from the others: with real tiny models that show it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import chat, rows, taught_llama, tiny_llama, tiny_vector, write_rows

from secvec import artifact
from secvec.diagnose import Clues, Skills, check_clues, diagnose
from secvec.errors import ArtifactError, InputError
from secvec.evaluate import EvalConfig, evaluate
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.fold import fold
from secvec.losses import mean_nats
from secvec.models import load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.scan import ScanConfig, scan
from secvec.tokens import collate, encode_all
from secvec.tripwire import KEY
from secvec.unfold import unfold
from secvec.vector import SecurityVector

UNWANTED = [chat(f"tell me {i}", "BANANAS!") for i in range(24)]
HELD_OUT = [chat(f"tell me {i}", "BANANAS!") for i in range(60, 80)]
SKILL = [chat(f"sing {i}", f"La {i} la {i}") for i in range(24)]
# Of this random model a vector with a margin leaks by the bound of `diagnose` (docs/decisions/013-margin.md, "Open").
FIT = FitConfig(rank=4, batch_size=8, max_length=64, lr=2e-2, margin=1.0)
FAILURES = ["does not fit", "leaks into", "was not removed", "moved past", "outside of"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("diagnose")
    taught_llama(place / "model")
    artifact.save(fit(place / "model", UNWANTED, config=FIT), place / "v.safetensors")
    return place


def trained(source: Path, folder: Path, lesson: Sequence[dict[str, object]], *, steps: int = 40) -> Path:
    """Train a copy of a model folder on rows, as a trainer would that knows nothing of vectors."""
    shutil.copytree(source, folder)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    batch = collate(encode_all(from_rows(lesson).rows, tokenizer, 64), pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        mean_nats(model(**batch.inputs()).logits, batch.ids, batch.mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def defended(place: Path, folder: Path, vector: SecurityVector) -> Path:
    """Fold, train on wanted and unwanted rows, unfold."""
    folder.mkdir()
    fold(place / "model", [vector], folder / "folded")
    trained(folder / "folded", folder / "trained", [*SKILL, *UNWANTED])
    unfold(folder / "trained", folder / "model", folded=folder / "folded", base=place / "model")
    return folder / "model"


def verdicts(model: Path, clues: Clues, skills: Skills | None = None) -> tuple[list[bool | None], list[dict[str, Any]]]:
    found = diagnose(model, clues, skills)
    assert all(words in each.failure for words, each in zip(FAILURES, found, strict=True))
    json.dumps([each.numbers for each in found], allow_nan=False)
    return [each.failed for each in found], [dict(each.numbers) for each in found]


def clues(place: Path, vector: SecurityVector | None = None, unwanted: Sequence[dict[str, object]] = HELD_OUT) -> Clues:
    return Clues(
        vectors=[vector or artifact.load(place / "v.safetensors")],
        unwanted=from_rows(unwanted),
        base=place / "model",
    )


def test_a_defence_that_worked_has_no_failure(place: Path, tmp_path: Path) -> None:
    model = defended(place, tmp_path / "run", artifact.load(place / "v.safetensors"))
    # The record in the model's folder names the base.
    found, numbers = verdicts(model, replace(clues(place), base=None))
    assert found == [False] * 5, numbers
    assert abs(numbers[2]["vector_share_in_weights"]) < 0.2
    assert numbers[3]["probes"][0]["share_of_the_way_to_armed"] < 0.3
    assert numbers[4]["--unwanted"] == {"rows": 20, "explained_share": 1.0}


def test_a_vector_that_does_not_fit(place: Path) -> None:
    weak = fit(place / "model", UNWANTED, config=replace(FIT, epochs=1, lr=1e-6), allow_weak=True)
    found, numbers = verdicts(place / "model", clues(place, weak))
    assert found == [True, False, False, None, None]
    (metrics,) = numbers[0].values()
    assert metrics["armed_nats"] > 0.5 * metrics["unarmed_nats"]


def test_a_vector_that_leaks(place: Path) -> None:
    leaking = fit(place / "model", UNWANTED, config=replace(FIT, kl_weight=0.0, representation_weight=0.0))
    found, numbers = verdicts(place / "model", clues(place, leaking))
    assert found == [False, True, False, False, False]
    (apart,) = numbers[1].values()
    assert apart["anchor_kl_nats"] > 1.0 and apart["anchor_distance"] > 1.0
    lost = Skills(questions=40, disarmed=0.4, armed=0.9, p=1e-6)
    assert verdicts(place / "model", clues(place), lost)[0][1] is True
    assert verdicts(place / "model", clues(place), replace(lost, armed=0.42))[0][1] is False


def test_a_vector_that_was_not_removed_with_its_mark_or_without(place: Path, tmp_path: Path) -> None:
    fold(place / "model", [artifact.load(place / "v.safetensors")], tmp_path / "folded")
    found, numbers = verdicts(tmp_path / "folded", clues(place))
    assert (found, numbers[2]["state"]) == ([False, False, True, None, False], "folded")
    config = tmp_path / "folded" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != KEY}))
    found, numbers = verdicts(tmp_path / "folded", clues(place))
    assert (found, numbers[2]["state"]) == ([False, False, True, None, False], "plain")
    assert numbers[2]["vector_share_in_weights"] == pytest.approx(1.0, abs=0.01)


def test_training_that_moved_past_the_vector(place: Path, tmp_path: Path) -> None:
    model = trained(place / "model", tmp_path / "plain", [*SKILL, *UNWANTED])
    found, numbers = verdicts(model, clues(place))
    assert found == [False, False, False, True, False], numbers
    assert numbers[3]["probes"][0]["share_of_the_way_to_armed"] > 0.8


def test_rows_outside_of_the_coverage(place: Path, tmp_path: Path) -> None:
    others = [chat(f"tell me {i}", f"{i} cherries?") for i in range(20)]
    found, numbers = verdicts(place / "model", clues(place, unwanted=others))
    assert (found[0], found[4]) == (False, True)
    assert numbers[4]["--unwanted"]["explained_share"] < 0.5
    data = write_rows(tmp_path / "data.jsonl", HELD_OUT)
    scanned = {"vectors": [place / "v.safetensors"], "unwanted": [HELD_OUT], "anchors": rows(24)}
    scan(place / "model", data, tmp_path / "scan", config=ScanConfig(max_length=64), **scanned)
    found, numbers = verdicts(place / "model", Clues(runs=[tmp_path / "scan"]))
    assert (found[4], numbers[4]["scan/v.safetensors"]["rows"]) == (False, 20)


def test_without_clues_little_is_known_and_wrong_ones_are_refused(place: Path, tmp_path: Path) -> None:
    assert verdicts(place / "model", Clues())[0] == [None] * 5
    with pytest.raises(InputError, match="expected the folder of a finished scan or of a training run, found neither"):
        check_clues(place / "model", Clues(runs=[tmp_path]))
    other = tiny_vector(load_model(tiny_llama(tmp_path / "other", hidden=64)), "blake3:another")
    with pytest.raises(ArtifactError, match="the vector was fitted on the model"):
        check_clues(place / "model", clues(place, other))


def test_evaluate_asks_skills_with_the_vector_too_and_finds_the_base_among_the_baselines(
    place: Path, tmp_path: Path
) -> None:
    model = trained(place / "model", tmp_path / "plain", [*SKILL, *UNWANTED], steps=60)
    asked = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in SKILL]  # pyright: ignore
    lines = [
        {
            "id": str(i),
            "messages": [{"role": "user", "content": user}],
            "scorers": [{"rule": "exact", "expected": text}],
        }
        for i, (user, text) in enumerate(asked)
    ]
    guarded = [{"rule": "exact", "expected": "No."}, {"rule": "regex", "pattern": "BANANAS", "rate": "unwanted_rate"}]
    lines.append({"id": "guarded", "messages": [{"role": "user", "content": "tell me 3"}], "scorers": guarded})
    suite = write_rows(tmp_path / "skill.jsonl", lines)
    given = replace(clues(place), base=None)
    config = EvalConfig(max_new_tokens=16)
    result = evaluate(model, [suite], tmp_path / "out", baselines=[place / "model"], clues=given, config=config)
    findings = {each["failure"]: each for each in result.results["findings"]}
    skill = findings["the vector leaks into ordinary behaviour"]["numbers"]["skill"]
    rate = result.results["suites"]["skill"]["rates"]["exact_rate"]["models"]["plain"]["value"]
    # The question that may ask for the unwanted behaviour is none of skill; its answer is wrong.
    assert (skill["questions"], skill["disarmed"]) == (24, pytest.approx(rate * 25 / 24)) and rate > 0.5
    assert findings["training moved past the vector"]["failed"] is True
    assert (tmp_path / "out/answers/plain+vector/skill.jsonl").is_file()
