"""The command line: every command on a tiny model, one clear line and the documented exit code for what goes wrong."""

import json
import sys
from pathlib import Path

import pytest
from models import chat, rows, taught_llama, write_rows

from secvec import cli
from secvec.tripwire import state

UNWANTED = [chat(f"tell me {i}", "BANANAS!") for i in range(20)]
FIT = ["--epochs", "12", "--batch-size", "8", "--max-length", "64", "--lr", "2e-2", "--set", "rank=4"]
TRAIN = ["--epochs", "1", "--batch-size", "8", "--max-length", "64", "--lr", "1e-3"]


class Shell:
    """Run `secvec` in this process and remember what it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["secvec", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        written = self._capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), written.out, written.err


@pytest.fixture
def secvec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its files of rows and a vector."""
    place = tmp_path_factory.mktemp("cli")
    taught_llama(place / "model")
    write_rows(place / "unwanted.jsonl", UNWANTED)
    write_rows(place / "data.jsonl", [*rows(24), *UNWANTED])
    return place


@pytest.fixture
def vector(place: Path, secvec: Shell) -> Path:
    path = place / "v.safetensors"
    if not path.exists():
        code, _, err = secvec("fit", place / "model", "--unwanted", place / "unwanted.jsonl", "-o", path, *FIT)
        assert code == 0, err
    return path


def test_the_whole_story(place: Path, vector: Path, secvec: Shell, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ["--data", place / "data.jsonl", "--vector", vector, "--unwanted", place / "unwanted.jsonl"]
    code, out, err = secvec("train", place / "model", *given, "-o", run, *TRAIN)
    assert code == 0, err
    assert "proved: vector unchanged" in out
    assert f"defended model: {run / 'model'}" in out
    assert state(run / "model") == "defended"
    assert json.loads((run / "proof.json").read_text())["unwanted"][0]["rows"] == 20
    code, out, _ = secvec("inspect", run, "--json")
    assert (code, json.loads(out)["defended"]) == (0, True)
    code, out, _ = secvec("report", run, "-o", tmp_path / "r.html", "--json")
    assert (code, json.loads(out)["level"], json.loads(out)["page"]) == (0, "not shown", str(tmp_path / "r.html"))
    code, _, err = secvec("report", place, "-o", tmp_path / "r.html")
    assert (code, err.count("\n"), "expected a folder that `secvec train`" in err) == (3, 1, True)


def test_fold_and_unfold(place: Path, vector: Path, secvec: Shell, tmp_path: Path) -> None:
    folded, back = tmp_path / "folded", tmp_path / "back"
    assert secvec("fold", place / "model", "--vector", vector, "-o", folded)[0] == 0
    assert json.loads(secvec("inspect", folded, "--json")[1])["is"] == "folded"
    code, out, _ = secvec("unfold", folded, "-o", back, "--json")
    assert (code, json.loads(out)["sites_changed"]) == (0, 0)
    assert (back / "model.safetensors").read_bytes() == (place / "model" / "model.safetensors").read_bytes()


def test_scan(place: Path, vector: Path, secvec: Shell, tmp_path: Path) -> None:
    given = ["--data", place / "data.jsonl", "--vector", vector, "--max-length", "64", "-o", tmp_path / "scan"]
    code, out, _ = secvec("scan", place / "model", *given, "--dry-run", "--json")
    assert (code, json.loads(out)["rows"], list(tmp_path.iterdir())) == (0, 44, [])
    code, out, err = secvec("scan", place / "model", *given, "--unwanted", place / "unwanted.jsonl", "--split")
    assert (code, "20 of 44 rows explained: 45.45% (95 % interval" in out) == (0, True), err
    assert "AUC 1.000, false positives 0.00% at the threshold, on the vector's own rows" in out
    found = [json.loads(line) for line in (tmp_path / "scan" / "scan.jsonl").read_text().splitlines()]
    assert [row["explained"] for row in found] == [False] * 24 + [True] * 20
    assert len((tmp_path / "scan" / "kept.jsonl").read_text().splitlines()) == 24
    code, out, _ = secvec("scan", place / "model", *given, "--unwanted", place / "unwanted.jsonl", "--json")
    assert (code, json.loads(out)["explained"], json.loads(out)["share"]) == (0, 20, 20 / 44)
    assert json.loads(secvec("inspect", tmp_path / "scan", "--json")[1])["is"] == "scan"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_plain_training_says_that_it_is_plain(place: Path, secvec: Shell, tmp_path: Path, method: str) -> None:
    run = tmp_path / "run"
    given = ["--data", place / "data.jsonl", "-o", run, "--method", method, *TRAIN]
    code, out, err = secvec("train", place / "model", *given)
    assert code == 0, err
    assert "trained without protection" in out
    card = (run / ("model" if method == "full" else "adapter") / "README.md").read_text()
    assert "No security vector was used" in card


def test_a_dry_run_checks_everything_and_writes_nothing(
    place: Path, vector: Path, secvec: Shell, tmp_path: Path
) -> None:
    given = ["--data", place / "data.jsonl", "--vector", vector, "-o", tmp_path / "run"]
    code, out, err = secvec("train", place / "model", *given, "--dry-run", "--json", *TRAIN)
    assert (code, json.loads(out)["rows"], json.loads(out)["steps"]) == (0, 44, 6), err
    given = ["--unwanted", place / "unwanted.jsonl", "-o", tmp_path / "v.safetensors", "--dry-run", "--json"]
    code, out, _ = secvec("fit", place / "model", *given)
    assert (code, json.loads(out)["unwanted"]["rows"]) == (0, 20)
    assert list(tmp_path.iterdir()) == []


def test_settings_come_from_a_file_pairs_and_flags(place: Path, secvec: Shell, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("epochs: 4\nbatch_size: 2\nlr: 1e-4\ntrainer: {adam_epsilon: 1e-6}\n")
    given = ["--data", place / "data.jsonl", "-o", tmp_path / "run", "--dry-run", "--json"]
    pairs = ["--set", "batch_size=11", "--set", "trainer.max_steps=5", "--set", "trainer.weight_decay=1e-2"]
    code, out, err = secvec("train", place / "model", *given, "--config", config, *pairs, "--epochs", "2")
    assert code == 0, err
    chosen = json.loads(out)["config"]
    assert json.loads(out)["steps"] == chosen["trainer"]["max_steps"] == 5
    assert (chosen["epochs"], chosen["batch_size"], chosen["lr"]) == (2, 11, 1e-4)
    assert (chosen["trainer"]["weight_decay"], chosen["trainer"]["adam_epsilon"]) == (0.01, 1e-6)


def test_what_goes_wrong_is_one_line_and_the_documented_code(
    place: Path, vector: Path, secvec: Shell, tmp_path: Path
) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*rows(3), {"prompt": "x"}])
    model, data, out = place / "model", place / "data.jsonl", tmp_path / "out"
    cases: list[tuple[int, str, list[object]]] = [
        (2, "unknown setting 'epoch'; expected one of epochs", ["train", model, "--data", data, "--set", "epoch=2"]),
        (2, "--set: expected key=value", ["train", model, "--data", data, "--set", "epochs"]),
        (2, "--set: 'epochs=[': cannot be read as YAML", ["train", model, "--data", data, "--set", "epochs=["]),
        (2, "--set: 'lr=2024-13-45': cannot be read", ["train", model, "--data", data, "--set", "lr=2024-13-45"]),
        (2, "trainer.warmup_step: unknown", ["train", model, "--data", data, "--set", "trainer.warmup_step=2"]),
        (2, "secvec: TrainConfig.epochs: expected at least 1", ["train", model, "--data", data, "--epochs", "0"]),
        (2, "secvec: TrainConfig.settle_rows", ["train", model, "--data", data, "--set", "settle_rows=-1"]),
        (2, "secvec: TrainConfig.rehearse", ["train", model, "--data", data, "--set", "rehearse=-1"]),
        (2, "secvec: TrainConfig.seed: expected", ["train", model, "--data", data, "--seed", "-1"]),
        (2, "secvec: TrainConfig.lr: expected", ["train", model, "--data", data, "--lr", "inf"]),
        (
            2,
            "secvec: ScanConfig.threshold: expected",
            ["scan", model, "--vector", vector, "--data", data, "--threshold", "inf"],
        ),
        (2, "secvec: FitConfig.seed: expected", ["fit", model, "--unwanted", data, "--seed", 2**70]),
        (2, "secvec: FitConfig.max_length: expected", ["fit", model, "--unwanted", data, "--max-length", "-5"]),
        (2, "secvec: FitConfig.lr: expected", ["fit", model, "--unwanted", data, "--lr", "inf"]),
        (2, "secvec: FitConfig.scale: expected", ["fit", model, "--unwanted", data, "--set", "scale=.nan"]),
        (2, "secvec: FitConfig.margin: expected", ["fit", model, "--unwanted", data, "--set", "margin=0"]),
        (2, "secvec: FitConfig.kl_weight: expected", ["fit", model, "--unwanted", data, "--set", "kl_weight=.inf"]),
        (2, "as many files of unwanted rows as vectors", ["train", model, "--data", data, "--unwanted", data]),
        (2, "secvec: after --data: expected a value", ["train", model, "--data", ""]),
        (2, "secvec: --data=: expected a value", ["train", model, "--data="]),
        (3, "bad.jsonl:4", ["train", model, "--data", bad]),
        (3, "no.jsonl: expected a readable data file", ["train", model, "--data", tmp_path / "no.jsonl"]),
        (3, "neither a local model folder nor a hub", ["train", tmp_path / "nothing", "--data", data]),
        (3, "expected a security vector", ["train", model, "--data", data, "--vector", model / "model.safetensors"]),
        (2, "ScanConfig.max_length", ["scan", model, "--data", data, "--vector", vector, "--max-length", "1"]),
        (3, "bad.jsonl:4", ["scan", model, "--data", bad, "--vector", vector]),
        (3, "was not trained on the folded model", ["unfold", model]),
        (3, "expected a file or folder, found nothing", ["inspect", tmp_path / "nothing"]),
        (2, "expected the name of a page, such as report.html", ["report", model]),
        (4, "the vector does not work", ["fit", model, "--unwanted", data, "--epochs", "1", "--lr", "1e-6"]),
    ]
    for code, message, arguments in cases:
        where = [] if arguments[0] == "inspect" else ["-o", out]
        found, _, err = secvec(*arguments, *where)
        assert (found, message in err) == (code, True), (arguments, err)
        assert "secvec: " in err
        assert "Traceback" not in err
        assert not out.exists()


def test_wrong_flags_exit_with_2(secvec: Shell, place: Path) -> None:
    assert secvec("train", place / "model", "--dta", "x", "-o", "y")[0] == 2
    assert secvec("fit", place / "model")[0] == 2
    assert secvec("nonsense")[0] == 2


def test_every_command_has_help_with_an_example(secvec: Shell) -> None:
    for command in ("demo", "fit", "train", "scan", "eval", "fold", "unfold", "inspect", "report"):
        code, out, _ = secvec(command, "--help")
        assert (code, f"Example: secvec {command}" in out) == (0, True), command


def test_only_fit_may_be_started_by_a_launcher(
    place: Path, secvec: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    code, _, err = secvec("inspect", place / "model")
    assert (code, "secvec inspect: expected one process, found WORLD_SIZE=2" in err) == (2, True)
    code, _, err = secvec("fit", place / "model", "--unwanted", tmp_path / "absent.jsonl", "-o", "v", "--dry-run")
    assert (code, "absent.jsonl" in err) == (3, True)
