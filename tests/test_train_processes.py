"""`train` in two processes under torchrun ends where one process ends, is proved, and goes on after a kill."""

import json
import pickle
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import chat, rows, taught_llama, write_rows
from runs import fitted_vector, random_vector, two_processes
from safetensors.torch import load_file

from secvec import artifact
from secvec.checkpoints import MANIFEST
from secvec.errors import MissingExtraError
from secvec.runfolder import RunFolder
from secvec.train import TrainConfig, train
from secvec.tripwire import state

# The last step of an epoch is one row: one of two processes has none for it.
DATA = rows(25)
UNWANTED = [chat(f"tell me {i}", "BANANAS!") for i in range(8)]
CONFIG = TrainConfig(lr=1e-3, epochs=2, batch_size=4, save_every=2, max_length=64, settle_rows=16)
LORA = replace(CONFIG, method="lora", lora_rank=4)
# Of the size of what was learned.
SAME = 1e-5

# Runs in each process. The last command fails: its one message must be all that is said of it.
SCRIPT = """
import os, sys
from dataclasses import replace
from pathlib import Path
from secvec import cli
from secvec.artifact import load
from secvec.drift import Watch
from secvec.errors import SecvecError
from secvec.fold import fold
from secvec.models import load_model, load_tokenizer
from secvec.probes import Probe
from secvec.processes import alone
from secvec.samples import read_samples
from secvec.tokens import encode_all
from secvec.train import TrainConfig, train
from secvec.trainer import Job, run
from test_train_processes import CONFIG, LORA
from transformers import LlamaForCausalLM

base, data, unwanted, rank = Path("model"), "data.jsonl", "unwanted.jsonl", os.environ["RANK"]

def say(*words):
    sys.stderr.write(f"[{rank}] {' '.join(map(str, words))}\\n")

def trained(name, config=CONFIG, **given):
    return train(base, data, name, vectors=["random"], config=config, **given)

def refused(work):
    try:
        work()
    except (SecvecError, OSError) as error:
        say(type(error).__name__, error)

def fails(error):
    raise error

def drifts(action):
    faint = replace(load("fitted"), scale=0.1 * load("fitted").scale)
    folder, tokenizer = Path(f"drift-{action}"), load_tokenizer(base)
    alone(lambda: (folder.mkdir(), fold(base, [faint], folder / "folded")))
    bad = encode_all(read_samples(unwanted).rows, tokenizer, 64)
    watch = Watch({0: Probe.of(load_model(base), bad, faint)}, [faint], action)
    paths = folder / "checkpoints", folder / "trained", folder / "metrics.jsonl"
    config = replace(CONFIG, lr=1e-2, save_every=500, trainer={"logging_steps": 1})
    run(Job(folder / "folded", bad * 10, tokenizer, config, *paths, watch=watch), None)

if sys.argv[1] == "killed":
    trained("killed", progress=lambda done, total, what: done == 9 and os.kill(os.getpid(), 9))
else:
    say("published", trained("full").model.exists())
    trained("lora", LORA)
    trained("killed", resume=True)
    train(base, "even.jsonl", "even", vectors=["fitted"], config=replace(CONFIG, calibrate=False))
    train(base, "even.jsonl", "recalled", vectors=["fitted"], config=replace(CONFIG, settle_rows=0))
    train(base, data, "plain", config=CONFIG)
    drifts("stop")
    drifts("slow")
    refused(lambda: trained("full"))
    refused(lambda: alone(lambda: fails(OSError("no such disk"))))
    LlamaForCausalLM.accepts_loss_kwargs = False
    refused(lambda: trained("averaged"))
    del LlamaForCausalLM.accepts_loss_kwargs
    refused(lambda: train(base, data, "diverged", vectors=["random"], config=replace(CONFIG, lr=1e30)))
    words = ["train", base, "--data", data, "--vector", "fitted", "--unwanted", unwanted]
    settings = ["--lr", "1e-3", "--epochs", 1, "--batch-size", 4, "--max-length", 64, "--set", "settle_rows=16"]
    sys.argv = ["secvec", *map(str, [*words, *settings, "-o", "command"])]
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code
    sys.argv = ["secvec", "train", str(base), "--data", "absent.jsonl", "--vector", "fitted", "-o", "never"]
    cli.main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("train")
    taught_llama(place / "model")
    write_rows(place / "data.jsonl", DATA)
    write_rows(place / "even.jsonl", rows(24))
    write_rows(place / "unwanted.jsonl", UNWANTED)
    artifact.save(random_vector(place / "model"), place / "random")
    artifact.save(fitted_vector(place / "model", UNWANTED), place / "fitted")
    (place / "script.py").write_text(SCRIPT)
    return place


@pytest.fixture(scope="module")
def killed(place: Path) -> Path:
    """A run of two processes that were both killed in the third quarter of their training."""
    assert two_processes("script.py", "killed", cwd=place).returncode != 0
    shutil.copytree(place / "killed", place / "killed-too")
    return place / "killed-too"


@pytest.fixture(scope="module")
def done(place: Path, killed: Path) -> subprocess.CompletedProcess[str]:
    """All else that two processes do, the run of `killed` taken up again included."""
    return two_processes("script.py", "all", cwd=place)


def one_process(place: Path, name: str, config: TrainConfig = CONFIG, **given: Any) -> Path:
    given = {"vectors": [place / "random"], "data": place / "data.jsonl"} | given
    return train(place / "model", out=place / name, config=config, **given).model


def weights(model: Path) -> dict[str, torch.Tensor]:
    [file] = model.glob("*.safetensors")
    return load_file(file)


def apart(found: Path, expected: Path, base: Path) -> float:
    """Return ||W_found - W_expected|| / ||U_expected|| over all tensors together; an adapter is U as it is."""
    one, other, start = weights(found), weights(expected), weights(base)
    assert one.keys() == other.keys()
    zero = torch.zeros(())
    different = sum(float((one[n] - other[n]).double().square().sum()) for n in other)
    return (different / sum(float((other[n] - start.get(n, zero)).double().square().sum()) for n in other)) ** 0.5


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_bits(one: Path, other: Path) -> bool:
    found, expected = weights(one), weights(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_processes_train_the_model_of_one(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.stderr.count("published True") == 2, done.stderr
    full, lora = one_process(place, "one"), one_process(place, "one-lora", LORA)
    plain = one_process(place, "one-plain", vectors=[])
    assert apart(place / "full" / "model", full, place / "model") < SAME
    assert apart(place / "plain" / "model", plain, place / "model") < SAME
    assert apart(place / "lora" / "adapter", lora, place / "model") < SAME
    assert state(place / "full" / "model") == state(place / "lora" / "adapter") == "defended"
    proofs = [json.loads((place / name / "proof.json").read_text()) for name in ("full", "one")]
    assert proofs[0]["vector"] == proofs[1]["vector"] and proofs[0]["armed"]["sites_fired"] == 14
    assert [line["step"] for line in metrics(place / "full")] == [line["step"] for line in metrics(place / "one")]


def test_sharing_a_step_is_accumulating_it(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    """To the bit, in the same order of sums: what differs from a whole step is rounding, which Adam may enlarge."""
    parts = replace(CONFIG, batch_size=2, grad_accumulation=2, calibrate=False)
    model = one_process(place, "parts", parts, vectors=[place / "fitted"], data=place / "even.jsonl")
    assert same_bits(place / "even" / "model", model), done.stderr


def test_what_a_vector_brought_back_is_calibrated_on_together(
    place: Path, done: subprocess.CompletedProcess[str]
) -> None:
    proof = json.loads((place / "recalled" / "proof.json").read_text())
    assert proof["recalled"][0] >= 20 and proof["vector"]["before"] != [
        artifact.digest(artifact.load(place / "fitted"))
    ], done.stderr


def test_killed_processes_go_on_in_two_or_in_one(
    place: Path, killed: Path, done: subprocess.CompletedProcess[str]
) -> None:
    sealed = {path.parent.name for path in RunFolder(killed).checkpoints.glob(f"*/{MANIFEST}")}
    assert sealed == {"checkpoint-7", "checkpoint-8"}
    assert not (killed / "model").exists() and "train" not in RunFolder(killed).finished()
    assert same_bits(place / "killed" / "model", place / "full" / "model"), done.stderr
    model = one_process(place, killed.name, resume=True)
    assert apart(model, place / "full" / "model", place / "model") < SAME


def test_drift_stops_or_slows_all_in_the_same_step(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    stopped, slowed = (metrics(place / f"drift-{action}") for action in ("stop", "slow"))
    [acted] = [line["step"] for line in slowed if "drift" in line]
    assert [line["step"] for line in stopped if "drift" in line] == [acted]
    assert max(line["step"] for line in stopped) == acted < max(line["step"] for line in slowed) == 40
    rates = {line["step"]: line["learning_rate"] for line in slowed if "learning_rate" in line}
    assert rates[acted + 2] < 0.11 * rates[acted]
    assert not [line for line in done.stderr.splitlines() if "different weights" in line]


def test_an_error_ends_all_and_is_told_once(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    for rank in (0, 1):
        assert f"[{rank}] UsageError {place}/full: expected a new or empty folder" in done.stderr
        assert f"[{rank}] InputError the training diverged" in done.stderr
        assert f"[{rank}] UsageError expected a model whose loss counts the tokens of all processes" in done.stderr
    assert "[1] InputError the main process failed: OSError('no such disk')" in done.stderr
    assert done.stderr.count("secvec: ") == 1 and "absent.jsonl" in done.stderr, done.stderr
    assert done.returncode == 1 and not (place / "never").exists() and not (place / "diverged" / "model").exists()
    error = pickle.loads(pickle.dumps(MissingExtraError("trl", "train")))
    assert str(error) == "trl is not installed; run: pip install 'secvec[train]'"


def test_the_command_calibrates_settles_and_proves(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    proof = json.loads((place / "command" / "proof.json").read_text())
    assert state(place / "command" / "model") == "defended"
    assert proof["drift"]["measurements"] >= 6
    assert "settled" in proof
    assert proof["vector"]["before"] == [artifact.digest(artifact.load(place / "command" / "vector-0.safetensors"))]
    assert done.stdout.count("2 processes: each takes 2 of the 4 rows of a step") == 1
    assert done.stdout.count("defended model: ") == 1
