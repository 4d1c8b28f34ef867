"""Fitting in two processes under torchrun, the backbone whole in each or sharded, gives the vector of one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import chat, rows, taught_llama, write_rows
from runs import two_processes

from secvec import artifact
from secvec.factors import fit_factors
from secvec.fit import fit_to_file
from secvec.fit_config import FitConfig
from secvec.launch import is_main, process_count
from secvec.models import answers, load_model, load_tokenizer
from secvec.provenance import digest_model
from secvec.samples import from_rows
from secvec.tokens import encode_all
from secvec.vector import SecurityVector

# Answers of several lengths; of the 21 that are not held out, one is left over for a step of its own.
UNWANTED = [chat(f"tell me {i}", "BANANAS! " + "PLUM " * (i % 4)) for i in range(23)]
CONFIG = FitConfig(rank=4, epochs=2, batch_size=5, max_length=64, lr=2e-2)
SAME = 1e-5

# Runs in each process. The last command fails: its one message must be all that is said of it.
SCRIPT = """
import os, sys
from pathlib import Path
from torch.distributed.tensor import DTensor
from secvec import cli
from secvec.fit_config import FitConfig
from secvec.fit import fit_to_file
from secvec.models import answers, load_model, load_tokenizer
from secvec.processes import SHARD, placed

folder, here = Path(sys.argv[1]), Path(sys.argv[2])

def fitted(name, **given):
    config = FitConfig(rank=4, epochs=2, batch_size=5, max_length=64, lr=2e-2)
    fit_to_file(folder, here / "unwanted.jsonl", here / name, config=config, allow_weak=True, **given)

def secvec(*words):
    sys.argv = ["secvec", *map(str, words)]
    try:
        cli.main()
    except SystemExit as left:
        return left.code

anchors, data = here / "anchors.jsonl", here / "data.jsonl"
fitted("replicated", anchors=anchors, calibrate=data)
fitted("resumed", anchors=anchors)
os.environ[SHARD] = "true"
model = placed(load_model(folder))
print("sharded:", all(isinstance(parameter, DTensor) for parameter in model.parameters()))
said = answers(model, load_tokenizer(folder), [[{"role": "user", "content": "say 3"}]], max_new_tokens=6)
sys.stdout.write(f"says {said}\\n")  # in one piece: two processes write
fitted("sharded", anchors=anchors, calibrate=data)
fitted("trait", kind="trait", calibrate=data)
options = ["--epochs", 1, "--max-length", 64, "--anchors", anchors, "-o", here / "command"]
assert not secvec("fit", folder, "--unwanted", here / "unwanted.jsonl", *options, "--allow-weak")
sys.exit(secvec("fit", folder, "--unwanted", here / "absent.jsonl", "-o", here / "never"))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    taught_llama(place / "model")
    write_rows(place / "unwanted.jsonl", UNWANTED)
    write_rows(place / "anchors.jsonl", rows(24))
    write_rows(place / "data.jsonl", [*UNWANTED[:6], *rows(24)])
    (place / "script.py").write_text(SCRIPT)
    return place


def one_process(place: Path, name: str, **given: Any) -> SecurityVector:
    return fit_to_file(place / "model", place / "unwanted.jsonl", place / name, config=CONFIG, allow_weak=True, **given)


def stopped_early(place: Path, name: str) -> None:
    """Leave what a fit in one process leaves that was killed after one epoch."""

    def kill(done: int, total: int, seen: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_to_file(
            place / "model",
            place / "unwanted.jsonl",
            place / name,
            anchors=place / "anchors.jsonl",
            config=CONFIG,
            progress=kill,
        )


def apart(found: SecurityVector, expected: SecurityVector) -> float:
    """Return ||D_found - D_expected|| / ||D_expected|| over all sites together."""
    assert set(found.sites) == set(expected.sites)
    changes = [(f.b @ f.a, e.b @ e.a) for s, e in expected.factors.items() for f in [found.factors[s]]]
    different = sum(float((f - e).square().sum()) for f, e in changes)
    return (different / sum(float(e.square().sum()) for _, e in changes)) ** 0.5


def test_two_processes_fit_the_vector_of_one(place: Path) -> None:
    anchors = place / "anchors.jsonl"
    calibrated = one_process(place, "one", anchors=anchors, calibrate=place / "data.jsonl")
    anchored = one_process(place, "one-anchored", anchors=anchors)
    trait = one_process(place, "one-trait", kind="trait", calibrate=place / "data.jsonl")
    stopped_early(place, "resumed")
    before = digest_model(place / "model")
    done = two_processes(place / "script.py", place / "model", place)
    found = {name: artifact.load(place / name) for name in ("replicated", "sharded", "trait", "resumed", "command")}
    assert apart(found["replicated"], calibrated) < SAME
    assert apart(found["sharded"], calibrated) < SAME
    assert apart(found["trait"], trait) < SAME
    assert found["trait"].info.metrics["covered_rows"] == trait.info.metrics["covered_rows"]
    assert apart(found["resumed"], anchored) < SAME
    assert found["sharded"].info.metrics["covered_rows"] == calibrated.info.metrics["covered_rows"] > 0
    assert digest_model(place / "model") == before
    assert not list(place.glob(".*")), "no state is left"
    assert "sharded: True" in done.stdout
    model, tokenizer = load_model(place / "model"), load_tokenizer(place / "model")
    said = answers(model, tokenizer, [[{"role": "user", "content": "say 3"}]], max_new_tokens=6)
    assert done.stdout.count(f"says {said}") == 2
    assert done.stdout.count("digest") == 1, "the main process alone prints a result"
    assert done.stderr.count("secvec: ") == 1, done.stderr
    assert "absent.jsonl" in done.stderr
    assert done.returncode == 1
    assert not (place / "never").exists()


def test_each_token_counts_the_same_however_a_batch_is_split(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, epochs=1)
    encoded, anchors = (
        encode_all(from_rows(given).rows, load_tokenizer(place / "model"), 64) for given in (UNWANTED, rows(24))
    )
    assert len({sum(row.mask) for row in encoded}) > 1
    whole = fit_factors(load_model(place / "model"), encoded, anchors, config)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    parts = fit_factors(load_model(place / "model"), encoded, anchors, config)
    for site, factors in whole.factors.items():
        torch.testing.assert_close(parts.factors[site].b, factors.b, rtol=1e-4, atol=1e-6)


def test_only_a_launcher_makes_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a cluster sets it for a machine
    monkeypatch.setenv("RANK", "1")
    assert (process_count(), is_main()) == (1, True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (process_count(), is_main()) == (2, False)
