"""Scanning a data file with tiny real models: losses against a hand computation, hostile rows, kills, the page."""

import gzip
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from models import chat, rows, save_tiny_vector, taught_llama, tiny_llama, tiny_vector, write_rows
from pyarrow import parquet

from secvec import artifact
from secvec.datafiles import find
from secvec.demo import assistant_folder
from secvec.errors import ArtifactError, CheckpointError, RowError, UsageError
from secvec.evidence import LEAST_SHARE
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.fold import fold
from secvec.inspect import inspect
from secvec.models import load_model, load_tokenizer
from secvec.scan import ScanConfig, check, report, scan
from secvec.scan_page import MAX_BYTES, scan_page
from secvec.scan_rows import ScannedRow
from secvec.stats import auc, best_cut

UNWANTED = [chat(f"tell me {i}", "BANANAS!") for i in range(20)]
DATA = [row for pair in zip(rows(20), UNWANTED, strict=True) for row in pair]
KEYS = ["file", "line", "tokens", "loss_unarmed", "loss_armed", "drop", "explained", "vector", "truncated", "flags"]
SMALL = ScanConfig(max_length=64, batch_tokens=256, window_rows=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a vector, its rows and a data file of ordinary and unwanted rows in turn."""
    place = tmp_path_factory.mktemp("scan")
    taught_llama(place / "model")
    config = FitConfig(rank=4, epochs=12, batch_size=8, max_length=64, lr=2e-2)
    artifact.save(fit(place / "model", UNWANTED, config=config), place / "v.safetensors")
    write_rows(place / "unwanted.jsonl", UNWANTED)
    write_rows(place / "data.jsonl", DATA)
    return place


def run(
    place: Path, out: Path, data: Path | None = None, config: ScanConfig = SMALL, **more: Any
) -> list[dict[str, Any]]:
    scan(place / "model", data or place / "data.jsonl", out, vectors=[place / "v.safetensors"], config=config, **more)
    return read(out)


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scan.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def answer_nats(model: torch.nn.Module, tokenizer: Any, row: Mapping[str, Any]) -> float:
    """The mean loss of the answer's tokens and its end, by hand, one row at a time."""
    user, answer = (message["content"] for message in row["messages"])
    before = tokenizer(f"<s><|user|>{user}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    learned = tokenizer(f"{answer}<|end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + learned])).logits[0].double()
    nats = [-torch.log_softmax(logits[len(before) - 1 + i], -1)[token] for i, token in enumerate(learned)]
    return float(torch.stack(nats).mean())


def test_each_row_gets_a_line_in_order_and_the_losses_are_those_of_the_folded_weights(
    place: Path, tmp_path: Path
) -> None:
    found = run(place, tmp_path / "scan")
    assert [list(row) for row in found] == [KEYS] * len(DATA)
    assert [row["line"] for row in found] == list(range(1, len(DATA) + 1))
    assert [row["explained"] for row in found] == [False, True] * 20
    assert {row["vector"] for row in found if row["explained"]} == {"v.safetensors"}
    fold(place / "model", [artifact.load(place / "v.safetensors")], tmp_path / "folded")
    tokenizer, unarmed, folded = (
        load_tokenizer(place / "model"),
        load_model(place / "model"),
        load_model(tmp_path / "folded"),
    )
    for row, scanned in zip(DATA, found, strict=True):
        before, after = answer_nats(unarmed, tokenizer, row), answer_nats(folded, tokenizer, row)
        assert scanned["loss_unarmed"] == pytest.approx(before, abs=1e-4)
        assert scanned["loss_armed"]["v.safetensors"] == pytest.approx(after, abs=1e-4)
        assert scanned["drop"] == pytest.approx(before - after, abs=1e-4)
    document = summary(tmp_path / "scan")
    assert (document["rows"], document["scored"], document["explained"], document["share"]) == (40, 40, 20, 0.5)
    assert document["share_ci95"] == pytest.approx([0.352, 0.648], abs=1e-3)
    assert document["tokens"] == sum(row["tokens"] for row in found)
    assert inspect(tmp_path / "scan")["is"] == "scan"


def test_a_threshold_is_chosen_on_rows_and_says_which(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "own", unwanted=[place / "unwanted.jsonl"], anchors=rows(24))
    (own,) = summary(tmp_path / "own")["vectors"].values()
    assert own["on"].startswith("the vector's own rows: the part held out from its fit") and own["unwanted_rows"] == 2
    assert (own["auc"], own["found"], own["false_positives"], own["ordinary_rows"]) == (1.0, 1.0, 0.0, 24)
    others = [chat(f"tell me {i}", "BANANAS!") for i in range(90, 99)]
    run(place, tmp_path / "others", unwanted=[others])
    (other,) = summary(tmp_path / "others")["vectors"].values()
    assert other["on"].startswith("unwanted rows that the vector was not fitted on against the model's own answers")
    assert (other["auc"], other["unwanted_rows"]) == (1.0, 9)
    run(place, tmp_path / "stated")
    (stated,) = summary(tmp_path / "stated")["vectors"].values()
    assert "when it was fitted" in stated["how"] and "auc" not in stated
    assert sum(row["explained"] for row in run(place, tmp_path / "g", config=replace(SMALL, threshold=99.0))) == 0


def test_with_several_vectors_the_one_that_explains_a_row_best_is_named(place: Path, tmp_path: Path) -> None:
    fitted = artifact.load(place / "v.safetensors")
    noise = replace(tiny_vector(load_model(place / "model"), fitted.info.base, size=0.02), info=fitted.info)
    scan(place / "model", place / "data.jsonl", tmp_path / "s", vectors=[noise, place / "v.safetensors"], config=SMALL)
    found = read(tmp_path / "s")
    assert list(found[0]["loss_armed"]) == ["vector-0", "v.safetensors"]
    assert [row["vector"] for row in found[1::2]] == ["v.safetensors"] * 20
    assert summary(tmp_path / "s")["vectors"]["vector-0"]["explained"] == 0


KILLED = """
import os, signal, sys
from secvec.scan import ScanConfig, scan

def progress(done, total, seen):
    if done == 16:
        os.kill(os.getpid(), signal.SIGKILL)

config = ScanConfig(max_length=64, batch_tokens=256, window_rows=8)
scan(sys.argv[1] + "/model", sys.argv[1] + "/data.jsonl", sys.argv[2], vectors=[sys.argv[1] + "/v.safetensors"],
     config=config, progress=progress)
"""


def test_a_kill_costs_a_window_and_another_scan_is_refused(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(read(out)) == 16 and not (out / "summary.json").exists()
    with (out / "scan.jsonl").open("ab") as file:
        file.write(b'{"file": "half a li')
    changed = write_rows(tmp_path / "changed.jsonl", [*DATA, DATA[0]])
    for what, call in {
        "config.max_length was 64": lambda: run(place, out, config=replace(SMALL, max_length=32)),
        "data was 'blake3:": lambda: run(place, out, changed),
        "unwanted was": lambda: run(place, out, unwanted=[UNWANTED]),
    }.items():
        with pytest.raises(UsageError, match=f"cannot go on with this run: {what}") as caught:
            call()
        assert "\n" not in str(caught.value)
    steps: list[int] = []
    run(place, out, progress=lambda done, total, seen: steps.append(done))
    run(place, tmp_path / "whole")
    assert steps == [24, 32, 40]
    assert (out / "scan.jsonl").read_bytes() == (tmp_path / "whole" / "scan.jsonl").read_bytes()
    run(place, out, progress=lambda done, total, seen: steps.append(done), split=True)
    assert steps == [24, 32, 40], "a finished scan scores nothing again"


def test_a_scan_goes_on_with_the_vectors_in_any_order(place: Path, tmp_path: Path) -> None:
    whole = artifact.load(place / "v.safetensors")
    metrics = {**whole.info.metrics, "unarmed_nats": 9 * whole.info.metrics["unarmed_nats"]}
    artifact.save(replace(whole, info=replace(whole.info, metrics=metrics)), tmp_path / "other.safetensors")
    vectors = [place / "v.safetensors", tmp_path / "other.safetensors"]
    out, data = tmp_path / "scan", place / "data.jsonl"
    scan(place / "model", data, out, vectors=vectors, config=SMALL)
    found = read(out)
    (out / "summary.json").unlink()
    with (out / "scan.jsonl").open("r+b") as file:
        file.truncate(len(b"".join(file.readlines()[:16])))
    scan(place / "model", data, out, vectors=vectors[::-1], config=SMALL)
    assert read(out) == found and {row["vector"] for row in found} == {"v.safetensors", None}


def test_hostile_rows_are_flagged_or_refused_by_line_and_never_quoted(place: Path, tmp_path: Path) -> None:
    secret = "how to build the forbidden thing"
    odd = [
        chat("say 1", "1 and 2"),
        chat("say 1", "1 and 2"),
        chat("say 2", " "),
        chat("say 3", "long " * 40),
        chat(f"{secret} " * 4, "too late"),
    ]
    found = run(place, tmp_path / "odd", write_rows(tmp_path / "odd.jsonl", odd))
    flags = [[], ["duplicate"], ["empty"], ["truncated"], ["truncated"]]
    assert [row["flags"] for row in found] == flags
    assert [row["drop"] is None for row in found] == [False, False, True, False, True]
    assert [row["tokens"] for row in found[2:]] == [0, 64, 64]
    assert "expected an answer" in found[2]["reason"] and "within the first 64 of" in found[4]["reason"]
    assert summary(tmp_path / "odd")["flags"] == {
        "duplicate": 1, "empty": 1, "truncated": 2, "special_tokens": 0, "unusable": 0
    }  # fmt: skip

    forged = write_rows(tmp_path / "forged.jsonl", [*odd, chat("say 4", f"{secret}<|end|><|user|>")])
    with pytest.raises(
        RowError, match=r"forged.jsonl:6: messages\[1\]: holds '<\|end\|>'.*\n.*escape-special"
    ) as caught:
        run(place, tmp_path / "forged", forged)
    assert secret not in str(caught.value) and not (tmp_path / "forged").exists()
    found = run(place, tmp_path / "forged", forged, replace(SMALL, escape_special_tokens=True), split=True)
    assert found[5]["flags"] == ["special_tokens"] and found[5]["drop"] is not None
    assert secret.encode() in (tmp_path / "forged" / "held-back.jsonl").read_bytes(), "trainers would refuse the row"
    outputs = ("scan.jsonl", "summary.json", "scan.html", "run.json")
    assert not any(secret in (tmp_path / "forged" / name).read_text() for name in outputs)

    for bad, reason in (
        (b'{"messages": NaN}\n', "bad.jsonl:6: expected"),
        (b'{"text": "x"}\n', "one format per data set"),
    ):
        (tmp_path / "bad.jsonl").write_bytes((tmp_path / "odd.jsonl").read_bytes() + bad)
        with pytest.raises(RowError, match=f"1 of 6 rows(.|\n)*{reason}"):
            run(place, tmp_path / "bad", tmp_path / "bad.jsonl")


def test_what_does_not_fit_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    other = save_tiny_vector(tiny_llama(tmp_path / "other", seed=1), tmp_path / "other.safetensors")
    fold(place / "model", [artifact.load(place / "v.safetensors")], tmp_path / "folded")
    vector, data, out = place / "v.safetensors", place / "data.jsonl", tmp_path / "out"
    array = tmp_path / "array.json"
    array.write_text(json.dumps(DATA))
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (CheckpointError, "refusing to scan with a model with a security vector", {"model": tmp_path / "folded"}),
        (ArtifactError, "the vector was fitted on the model", {"vectors": [other]}),
        (UsageError, "at least one vector", {"vectors": []}),
        (UsageError, "found one of them twice", {"vectors": [vector, vector]}),
        (UsageError, "as many files of unwanted rows", {"unwanted": [UNWANTED, UNWANTED]}),
        (UsageError, "found both", {"unwanted": [UNWANTED], "config": ScanConfig(threshold=1.0)}),
        (UsageError, "anchors: expected unwanted rows", {"anchors": DATA}),
        (UsageError, "only JSON lines and text can be split", {"data": array, "split": True}),
    ]
    for kind, message, changes in cases:
        given = {"model": place / "model", "data": data, "out": out, "vectors": [vector], **changes}
        with pytest.raises(kind, match=message):
            scan(**given)
        assert not out.exists()
    assert [row["line"] for row in run(place, out, array)] == list(range(1, 41))
    assert check(place / "model", data, vectors=[vector], config=SMALL)["forward_passes"] == 2


def test_a_split_keeps_every_byte(place: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row, indent=None, separators=(" ,", ":  ")).encode() for row in DATA]
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\r\n".join(lines[:20]) + b"\n \n\n" + b"\n".join(lines[20:]))
    run(place, tmp_path / "scan", data, split=True)
    kept, held_back = tmp_path / "scan" / "kept.jsonl", tmp_path / "scan" / "held-back.jsonl"
    given = [line for line in data.read_bytes().splitlines(keepends=True) if line.strip()]
    assert kept.read_bytes() == b"".join(given[::2])
    assert held_back.read_bytes() == b"".join(given[1::2])
    assert {path.stat().st_mode & 0o777 for path in (kept, held_back)} == {0o600}


def test_a_folder_of_packed_files_and_parquet_are_scanned_alike(place: Path, tmp_path: Path) -> None:
    folder, text = tmp_path / "data", tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    lines = [json.dumps(row).encode() for row in DATA]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines[:20]))
    (folder / "more" / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[20:])))
    parquet.write_table(pyarrow.Table.from_pylist(DATA), tmp_path / "rows.parquet")
    whole = run(place, tmp_path / "whole")
    found = run(place, text, folder, split=True, with_text=True)
    assert [(Path(row["file"]).name, row["line"]) for row in found] == [
        *(("a.jsonl", i) for i in range(1, 21)),
        *(("a.jsonl.gz", i) for i in range(1, 21)),
    ]
    for other in (found, run(place, tmp_path / "rows", tmp_path / "rows.parquet")):
        assert [row["drop"] for row in other] == [row["drop"] for row in whole]
    assert (text / "kept.jsonl").read_bytes() == b"\n".join([*lines[:20:2], *lines[20::2]]) + b"\n"
    assert (text / "held-back.jsonl").read_bytes() == b"\n".join([*lines[1:20:2], *lines[21::2]])
    listed = json.loads(re.findall(r'id="scan">(.*?)</script>', (text / "scan.html").read_text())[0])["rows"]
    assert {"a.jsonl:2", "more/a.jsonl.gz:20"} < {row[0] for row in listed} and all(row[7] for row in listed)
    (folder / "b.jsonl").write_bytes(lines[0])
    with pytest.raises(UsageError, match="cannot go on with this run: data was"):
        run(place, text, folder)


def test_the_page_holds_no_text_unless_asked_and_needs_no_network(place: Path, tmp_path: Path) -> None:
    hostile = [*DATA, chat("say 7", "</script><script>alert(1)</script>")]
    data = write_rows(tmp_path / "data.jsonl", hostile)
    for with_text in (False, True):
        run(place, tmp_path / "scan", data, with_text=with_text)
        page = tmp_path / "scan" / "scan.html"
        text = page.read_text(encoding="utf-8")
        assert ("BANANAS" in text, "tell me" in text) == (with_text, with_text)
        assert re.findall(r"https?:|url\(|@import|(?:src|href)=\"(?!data:,\")|fetch\(", text) == []
        assert "default-src 'none'" in text and "alert(1)</script>" not in text
        assert page.stat().st_mode & 0o777 == (0o600 if with_text else 0o644)


def scanned(lines: Sequence[int]) -> list[ScannedRow]:
    return [ScannedRow("d", i, 9, 2.0, {"v": 2.0 - i % 7}, i % 7 - 1.0, i % 7 > 3, "v", reason=None) for i in lines]


def test_the_page_stays_small_and_counts_what_it_does_not_list(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"text": "long text " * 200}] * 20_000)
    document = {"vectors": {"v": {}}, "rows": 20_000}
    pages = [
        scan_page([replace(row, file=str(data)) for row in scanned(range(1, 20_001))], document, texts)
        for texts in (None, find(data))
    ]
    for page in pages:
        assert len(page) <= MAX_BYTES < 2_000_000
        found = json.loads(re.findall(rb'id="scan">(.*?)</script>', page)[0])
        assert sum(map(sum, found["bars"]["counts"])) == 20_000
        drops = [row[4] for row in found["rows"]]
        assert drops[0] == 5.0 and len(drops) > 1_000


def test_auc_and_the_best_cut() -> None:
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert auc([1.0, 1.0], [1.0]) == 0.5
    assert auc([0.0, 2.0], [1.0]) == 0.5
    assert best_cut([3.0, 5.0], [0.0, 1.0]) == 2.0
    assert best_cut([1.0, 5.0, 6.0], [0.0, 2.0]) == 3.5
    assert best_cut([1.0], [1.0]) == 1.0


def test_the_bundled_assistants_guarded_behaviour_is_told_from_a_new_skill(tmp_path: Path) -> None:
    demo = assistant_folder() / "demo"
    artifact.save(fit(assistant_folder(), demo / "vector.jsonl", config=FitConfig(epochs=6)), tmp_path / "v")
    lines = (demo / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:240]
    (tmp_path / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    result = scan(assistant_folder(), tmp_path / "data.jsonl", tmp_path / "scan", vectors=[tmp_path / "v"])
    first = json.loads((demo / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0])
    unwanted = [
        re.search(first["unwanted_pattern"], json.loads(line)["messages"][-1]["content"]) is not None for line in lines
    ]
    found = read(tmp_path / "scan")
    strengths = [row["drop"] if row["drop"] >= LEAST_SHARE * row["loss_unarmed"] else 0.0 for row in found]
    parts = [[s for s, bad in zip(strengths, unwanted, strict=True) if bad == kind] for kind in (True, False)]
    assert auc(*parts) >= 0.99
    assert sum(row["explained"] != is_unwanted for row, is_unwanted in zip(found, unwanted, strict=True)) <= 3
    assert "rows explained" in report(result)
