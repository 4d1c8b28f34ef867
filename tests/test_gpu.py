"""`python -m benchmarks.gpu --toy` runs on a CPU and gives every row; without a GPU nothing else is measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.measure import flops_per_token
from benchmarks.gpu.shapes import SHAPES, build

WAYS = ("plain", "hooked", "folded", "plain, again")
STEPS = {(what, context, way) for what in ("LoRA", "full fine-tuning") for context in (16, 32) for way in WAYS}
OTHERS = {
    *(("generate", None, way) for way in ("plain", "hooked")),
    *(("fold", None, way) for way in ("there and back", "on the device")),
    ("fit, 8 rows x 1 epochs", None, ""),
}


def test_the_toy_run_gives_every_row_and_says_that_it_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--toy", "--steps", "2", "--json", str(tmp_path / "g.json"), "--markdown", str(tmp_path / "g.md")])
    document = json.loads((tmp_path / "g.json").read_text())
    rows = document["rows"]
    assert {(row["what"], row["context"], row["way"]) for row in rows} == STEPS | OTHERS
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows)
    assert {row["note"] for row in rows if row["what"] == "fold"} == {"bits as on a processor"}
    text = (tmp_path / "g.md").read_text()
    assert document["toy"]
    assert "**A toy run" in text
    assert text in capsys.readouterr().out


def test_what_there_is_no_time_for_is_not_left_out(tmp_path: Path) -> None:
    main(["--toy", "--budget-s", "0", "--json", str(tmp_path / "g.json")])
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["generation", "fit", "lora", "full", "fold"]
    assert {row["note"] for row in rows} == {"not measured: out of time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said without a GPU")
def test_real_shapes_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "expected a GPU, found none" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "billions"), [("llama-2-7b", 6.74), ("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19)])
def test_the_shapes_are_those_of_the_models(name: str, billions: float) -> None:
    model = build(SHAPES[name], torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert flops_per_token(model, 2048, whole=True) > flops_per_token(model, 2048, whole=False)
