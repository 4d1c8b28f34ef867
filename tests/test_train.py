"""`train` from rows to a proved model: full and lora, every dtype, several vectors, plain; and what it refuses."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import rows, write_rows
from runs import CONFIG, UNWANTED, Run, attempt, fitted_vector, gpt2, limit_files, llama, main, random_vector, started
from safetensors.torch import load_file

import secvec
from secvec import artifact, cli
from secvec.card import hub_id
from secvec.errors import (
    ArtifactError,
    CheckpointError,
    InputError,
    MissingExtraError,
    ProofError,
    SecvecError,
    UsageError,
)
from secvec.models import load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.score import mean_over, row_nats
from secvec.tokens import encode_all
from secvec.train import check, summary, train
from secvec.tripwire import state

QUICK = replace(CONFIG, epochs=1, save_every=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return llama(folder / "base")


@pytest.fixture(scope="module")
def fitted(base: Path) -> secvec.SecurityVector:
    return fitted_vector(base)


@pytest.fixture(scope="module")
def finished(base: Path, fitted: secvec.SecurityVector, folder: Path) -> Run:
    """A defended run, calibrated, that is done; tests go on with it and leave it as it is."""
    run = Run(base, folder / "finished", [fitted], [UNWANTED], QUICK)
    run.go(resume=False)
    return run


def dtypes(weights: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(weights).values()}


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_full_training_ends_in_the_bases_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base = llama(tmp_path / "base", dtype=dtype, tied=dtype is not torch.float32)
    result = train(base, rows(), tmp_path / "run", vectors=[random_vector(base)], config=QUICK)
    assert result.model == tmp_path / "run" / "model" and state(result.model) == "defended"
    assert dtypes(result.model / "model.safetensors") == {dtype}
    assert load_model(result.model).dtype == dtype and load_tokenizer(result.model).chat_template
    assert result.proof is not None and result.proof["armed"]["sites_fired"] == 14
    assert not (tmp_path / "run" / "work").exists()
    moved = load_file(result.model / "model.safetensors"), load_file(base / "model.safetensors")
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_names_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = llama(tmp_path / "base", dtype=dtype, tied=dtype is not torch.float32)
    config = replace(QUICK, method="lora", lora_rank=4)
    result = train(base, rows(), tmp_path / "run", vectors=[random_vector(base)], config=config)
    assert result.model == tmp_path / "run" / "adapter" and state(result.model) == "defended"
    settings = json.loads((result.model / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    weights = load_file(result.model / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gpt2(tmp_path: Path, method: Any) -> None:
    base = gpt2(tmp_path / "base")
    result = train(base, rows(), tmp_path / "run", vectors=[random_vector(base)], config=replace(QUICK, method=method))
    assert result.proof is not None and result.proof["armed"]["sites_fired"] == 8


def test_weights_in_bfloat16(tmp_path: Path, base: Path) -> None:
    config = replace(QUICK, dtype="bfloat16", lr=1e-2)
    result = train(base, rows(), tmp_path / "run", vectors=[random_vector(base)], config=config)
    assert dtypes(result.model / "model.safetensors") == {torch.float32}


def test_weights_that_are_in_no_site_are_named(base: Path) -> None:
    vector = random_vector(base)
    vector = replace(vector, info=replace(vector.info, metrics={"no_site": "mlp.gate: 1%"}))
    assert "no site: mlp.gate: 1%" in check(base, rows(), vectors=[vector])["notes"]


def test_several_vectors_each_calibrated(tmp_path: Path, base: Path, fitted: secvec.SecurityVector) -> None:
    shouting = [{"prompt": f"shout {i}", "completion": "LOUD"} for i in range(8)]
    run = Run(base, tmp_path / "run", [fitted, fitted_vector(base, shouting)], [UNWANTED, shouting], QUICK)
    run.go()
    proof = json.loads((run.out / "proof.json").read_text())
    calibrated = [artifact.load(run.out / f"vector-{i}.safetensors") for i in range(2)]
    assert proof["vector"]["before"] == [artifact.digest(vector) for vector in calibrated]
    assert [vector.info.metrics["calibration_rows"] for vector in calibrated] == [24, 24]
    for probe in proof["unwanted"]:
        assert 4 * probe["armed_nats"] < probe["aligned_nats"] < 1.25 * probe["defended_nats"]


def test_a_calibrated_run_and_its_card(finished: Run) -> None:
    card = (finished.out / "model" / "README.md").read_text()
    proof = json.loads((finished.out / "proof.json").read_text())
    assert proof["vector"]["after"][0] in card and "loss of 8 unwanted rows" in card
    assert "No security vector" not in card and "uncalibrated" not in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["secvec", "security-vector"],
    }, "the hub refuses a folder as base_model"
    identity = json.loads((finished.out / "run.json").read_text())
    assert all(digest in card for digest in (identity["base"], identity["data"], *identity["unwanted"]))
    assert str(finished.base) not in card
    cached = finished.out / "models--fern--tilly" / "snapshots" / "0a1b"
    assert (hub_id(cached), hub_id(finished.base)) == ("fern/tilly", None)
    assert sorted(path.name for path in finished.out.iterdir()) == [
        "lock", "metrics.jsonl", "model", "proof.json", "run.json", "state.json", "vector-0.safetensors"
    ]  # fmt: skip


def test_a_vector_without_its_rows_is_used_as_it_is(tmp_path: Path, base: Path) -> None:
    vector = random_vector(base)
    result = train(base, rows(), tmp_path / "run", vectors=[vector], config=QUICK)
    assert result.proof is not None and result.proof["vector"]["before"] == [artifact.digest(vector)]
    assert any(note.startswith("no --unwanted") for note in result.notes)
    assert "defended model" in summary(result) and "proved: the vector is out" in summary(result)


@pytest.mark.parametrize(
    ("method", "dtype"), [("full", torch.bfloat16), ("full", torch.float32), ("lora", torch.float32)]
)
def test_a_plain_run_says_so(tmp_path: Path, method: Any, dtype: torch.dtype) -> None:
    base = llama(tmp_path / "base", dtype=dtype)
    result = train(base, rows(), tmp_path / "run", config=replace(QUICK, method=method))
    card = (result.model / "README.md").read_text()
    assert "No security vector was used" in card and '"undefended"' in card
    assert result.proof is None and not (tmp_path / "run" / "proof.json").exists()
    assert state(result.model) == ("adapter" if method == "lora" else "plain")
    if method == "full":
        assert dtypes(result.model / "model.safetensors") == {dtype}
        assert json.loads((result.model / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert load_tokenizer(result.model).chat_template
    assert "defended" not in summary(result)


def test_loss_is_on_the_assistants_tokens_alone(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dropout=0.0)
    few = rows(4)
    train(base, few, tmp_path / "run", config=replace(QUICK, epochs=1))
    encoded = encode_all(from_rows(few).rows, load_tokenizer(base), 128)
    expected = mean_over(encoded, row_nats(load_model(base), encoded))
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, abs=1e-4)


def test_the_seed_decides(tmp_path: Path, base: Path) -> None:
    weights: list[bytes] = []
    for i, seed in enumerate((3, 3, 4)):
        torch.rand(i + 1)
        config = replace(QUICK, method="lora", seed=seed)
        result = train(base, rows(), tmp_path / str(i), config=config)
        weights.append((result.model / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_going_on_with_a_finished_run_changes_nothing(finished: Run) -> None:
    before = (finished.out / "state.json").read_bytes()
    assert finished.go() == finished.out / "model"
    assert (finished.out / "state.json").read_bytes() == before


def test_a_finished_run_whose_work_was_being_deleted(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.out, tmp_path / "run")
    (tmp_path / "run" / "work" / "folded").mkdir(parents=True)
    (tmp_path / "run" / ".state.json.abc.tmp").touch()
    replace(finished, out=tmp_path / "run").go()
    assert not (tmp_path / "run" / "work").exists() and not list((tmp_path / "run").glob(".*"))


def test_a_finished_run_is_not_started_again(finished: Run) -> None:
    with pytest.raises(UsageError, match="go on with this run"):
        finished.go(resume=False)


def others(run: Run) -> Iterator[tuple[Run, str]]:
    yield replace(run, config=replace(run.config, lr=1e-4)), "config.lr was 0.001 and is now 0.0001"
    yield replace(run, config=replace(run.config, trainer={"warmup_steps": 2})), "config.trainer.warmup_steps"
    yield replace(run, data=rows(23)), "data was"
    yield replace(run, unwanted=[UNWANTED[:7]]), "unwanted was"
    yield replace(run, vectors=[random_vector(run.base)]), "vectors was"
    yield replace(run, vectors=[], unwanted=[]), "vectors was"


def test_another_run_is_refused_naming_what_differs(finished: Run, tmp_path: Path) -> None:
    for other, told in others(finished):
        with pytest.raises(UsageError) as caught:
            other.go()
        assert told in str(caught.value)
    shutil.copytree(finished.base, tmp_path / "moved")
    with pytest.raises(UsageError, match="base_path was"):
        replace(finished, base=tmp_path / "moved").go()


def test_a_published_model_that_was_altered_is_refused(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.out, tmp_path / "run")
    run = replace(finished, out=tmp_path / "run")
    (run.out / "model" / "README.md").write_text("my words")
    run.go()
    (run.out / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="'publish' wrote was altered"):
        run.go()
    shutil.rmtree(run.out / "model")
    with pytest.raises(CheckpointError, match="found nothing"):
        run.go()


def test_settings_that_json_writes_otherwise_do_not_differ(tmp_path: Path, base: Path) -> None:
    config = replace(QUICK, trainer={"lr_scheduler_kwargs": {}, "logging_steps": 5, "optim_args": None})
    run = Run(base, tmp_path / "run", config=config, data=rows(4))
    run.go()
    run.go()


def test_every_public_name_is_what_it_says(finished: Run) -> None:
    names = ("fit", "fold", "unfold", "train")
    assert [type(getattr(secvec, name)).__name__ for name in names] == ["function"] * 4


def test_without_the_extra_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(secvec.__dict__, "train", raising=False)
    for module in list(sys.modules):
        if module.startswith("trl") or module in ("secvec.train", "secvec.trainer", "secvec.trainer_settings"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"trl is not installed; run: pip install 'secvec\[train\]'"):
        _ = secvec.train


@pytest.mark.parametrize("report_to", ["tensorboard", "wandb", "trackio"])
def test_a_reporter_that_is_not_installed(tmp_path: Path, base: Path, report_to: Any) -> None:
    pytest.importorskip("trl")
    with pytest.raises(UsageError, match=f"{report_to} is not installed; run: pip install {report_to}"):
        train(base, rows(), tmp_path / "run", config=replace(QUICK, report_to=report_to))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"learning_rat": 1}, "trainer.learning_rat: unknown setting .* learning_rate"),
        ({"learning_rate": 1}, "trainer.learning_rate: set 'lr' instead"),
        ({"push_to_hub": True}, "would publish a model with the security vector in it"),
        ({"packing": True}, "the rows are tokenised already"),
        ({"save_total_limit": 1}, "could not go on from its checkpoints"),
        ({"do_eval": True}, "no evaluation rows"),
        ({"fsdp": "full_shard"}, "holds the whole model in each process"),
        ({"max_grad_norm": float("inf")}, "a value that JSON can hold"),
        ({"lr_scheduler_type": "steep"}, "the trainer refuses its settings"),
    ],
)
def test_settings_of_the_trainer_that_are_refused(base: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check(base, rows(), config=replace(QUICK, trainer=settings))


def test_what_several_processes_cannot_do(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check(base, rows())["steps"] == 9  # as a cluster sets it for a machine
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="batch_size: expected a multiple of the 2 processes"):
        check(base, rows(), config=replace(QUICK, batch_size=3))
    with pytest.raises(UsageError, match="ddp_timeout: refused, the launcher decides"):
        check(base, rows(), config=replace(QUICK, trainer={"ddp_timeout": 5}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"ACCELERATE_USE_FSDP: refused, .*`secvec fold`"):
        check(base, rows())


def test_inputs_that_do_not_fit(tmp_path: Path, base: Path, fitted: secvec.SecurityVector) -> None:
    other = llama(tmp_path / "other", tied=True)
    refused: list[tuple[type[SecvecError], str, Any, Any]] = [
        (UsageError, "one of them twice", [fitted, fitted], []),
        (UsageError, "as many files of unwanted rows as vectors", [fitted], [UNWANTED, UNWANTED]),
        (ArtifactError, "fitted on the model", [random_vector(other)], []),
        (ArtifactError, "chat template", [replace(fitted, info=replace(fitted.info, chat_template="sha256:x"))], []),
    ]
    for error, told, vectors, unwanted in refused:
        with pytest.raises(error, match=told):
            check(base, rows(), vectors=vectors, unwanted=unwanted)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="unquantised"):
        check(other, rows())


def test_a_dry_run_says_what_would_be_done(base: Path, fitted: secvec.SecurityVector) -> None:
    report = check(base, rows(), vectors=[fitted], unwanted=[UNWANTED], config=CONFIG)
    assert (report["rows"], report["steps"]) == (24, 12)


DIVERGING = [("full", {}), ("full", {"logging_steps": 1}), ("lora", {})]


@pytest.mark.parametrize(("method", "trainer"), DIVERGING)
@pytest.mark.parametrize("defended", [False, True], ids=["plain", "defended"])
def test_a_training_that_diverges_is_not_published(
    tmp_path: Path, base: Path, method: Any, trainer: dict[str, Any], defended: bool
) -> None:
    config = replace(QUICK, method=method, lr=1e30, trainer=trainer)
    vectors = [random_vector(base)] if defended else []
    with pytest.raises(InputError, match=r"the training diverged: found .*; lower --lr"):
        train(base, rows(), tmp_path / "run", vectors=vectors, config=config)
    assert not any((tmp_path / "run" / name).exists() for name in ("model", "adapter", "proof.json"))


def test_weights_that_outgrow_fp16_are_not_published(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"weights that torch.float16 can hold"):
        train(base, rows(4), tmp_path / "run", config=replace(QUICK, lr=1e6))
    assert not (tmp_path / "run" / "model").exists()


def test_no_proof_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = llama(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "run"
    artifact.save(random_vector(base, size=1e-4), tmp_path / "v")
    data = write_rows(tmp_path / "rows.jsonl", rows())
    words = ["train", str(base), "--data", str(data), "--vector", str(tmp_path / "v"), "--lr", "1e-8", "-o", str(out)]
    for extra in ([], ["--resume"]):
        monkeypatch.setattr(sys, "argv", ["secvec", *words, *extra])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == ProofError.exit_code == 4
        assert "lost in the rounding" in capsys.readouterr().err
        assert not any((out / name).exists() for name in ("model", "adapter", "proof.json"))


@pytest.mark.parametrize("kib", [40, 200])
def test_a_full_disk_says_how_to_go_on(tmp_path: Path, base: Path, kib: int) -> None:
    run = Run(base, tmp_path / "run", [random_vector(base)], config=CONFIG)
    process = started(limit_files, run, kib << 10, tmp_path / "told")
    process.join()
    told = (tmp_path / "told").read_text()
    assert told.startswith("CheckpointError") and "free some space, then go on with --resume" in told
    assert not (run.out / "model").exists()
    assert run.go().exists()


def test_ctrl_c_exits_130_and_says_how_to_go_on(tmp_path: Path, base: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows())
    words = ["train", str(base), "--data", str(data), "-o", str(tmp_path / "run"), "--epochs", "500"]
    process = started(main, words, tmp_path / "told")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert "--resume" in (tmp_path / "told").read_text()


def test_a_second_process_is_kept_out(tmp_path: Path, base: Path) -> None:
    run = Run(base, tmp_path / "run", config=replace(CONFIG, epochs=500))
    process = started(attempt, run, str)
    while not (run.out / "metrics.jsonl").exists():
        time.sleep(0.05)
    with pytest.raises(UsageError, match="another process is working in this run folder"):
        run.go()
    process.kill()
    process.join()
