"""A run that is killed at any moment, and goes on, ends with the bytes of one that was not."""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import flip
from runs import CONFIG, UNWANTED, Run, attempt, count_changes, fitted_vector, kill_at, llama, random_vector, started

from secvec.checkpoints import MANIFEST, seal, step_of
from secvec.errors import CheckpointError
from secvec.runfolder import RunFolder

KINDS = ("full", "lora", "calibrated", "plain")
KILLS = 5
SIGKILL = -9


@dataclass(frozen=True)
class Reference:
    """A run that nobody stopped: what it left, how often it changed a file, and how long it took."""

    run: Run
    changes: int
    seconds: float

    def again(self, out: Path) -> Run:
        return replace(self.run, out=out)


def end(run: Run, prepare: Callable[[], Any]) -> int | None:
    process = started(attempt, run, prepare)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("references")
    base = llama(folder / "base")
    vector = fitted_vector(base)
    runs = {
        "full": Run(base, folder / "full", [random_vector(base)]),
        "lora": Run(base, folder / "lora", [random_vector(base)], config=replace(CONFIG, method="lora", lora_rank=4)),
        "calibrated": Run(base, folder / "calibrated", [vector], [UNWANTED]),
        "plain": Run(base, folder / "plain"),
    }
    references: dict[str, Reference] = {}
    for name, run in runs.items():
        begun = time.monotonic()
        assert end(run, partial(count_changes, run.out)) == 0
        changes = int((folder / f"{run.out.name}.count").read_text())
        references[name] = Reference(run, changes, time.monotonic() - begun)
    return references


def left(run: Run) -> dict[str, bytes]:
    """Return what a finished run left, but for the seconds its phases took and for where it lies."""
    folders = [path for path in run.out.rglob("*") if path.is_file() and path.name not in ("state.json", "lock")]
    files = {str(path.relative_to(run.out)): path.read_bytes() for path in folders}
    return files | {"metrics.jsonl": steps(run)}


def steps(run: Run) -> bytes:
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return repr([line["step"] for line in lines]).encode()


def check_same(run: Run, reference: Reference) -> None:
    found, expected = left(run), left(reference.run)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def kill(run: Run, reference: Reference, draw: random.Random) -> bool:
    """Start or go on with a run and kill it: at a change of a file, or after some time. False: it ended before that."""
    if draw.random() < 0.5:
        code = end(run, partial(kill_at, run.out, draw.randint(1, reference.changes)))
    else:
        process = started(attempt, run, str)
        process.join(draw.uniform(0, reference.seconds))
        process.kill()
        process.join()
        code = process.exitcode
    assert code in (SIGKILL, 0)
    return code == SIGKILL


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_instants(references: dict[str, Reference], kind: str, tmp_path: Path) -> None:
    """Five a kind, twenty in all; a run that ends before its kill is followed by another."""
    reference, draw, killed, number = references[kind], random.Random(f"kills/{kind}"), 0, 0
    while killed < KILLS:
        run = reference.again(tmp_path / str(number))
        while killed < KILLS and kill(run, reference, draw):
            killed += 1
        assert end(run, str) == 0
        check_same(run, reference)
        number += 1


def killed_when(reference: Reference, out: Path, first: int, reached: Callable[[Run], bool]) -> Path:
    """Kill a run at its first change of a file, from number `first` on, at which `reached` holds."""
    run = reference.again(out)
    for number in range(first, reference.changes):
        assert end(run, partial(kill_at, out, number)) == SIGKILL
        if reached(run):
            return out
        shutil.rmtree(out)
    raise AssertionError("expected an instant of that kind, found none")


@pytest.fixture(scope="module")
def stopped(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run that was killed in the middle of its training, with two checkpoints."""
    out, reference = tmp_path_factory.mktemp("stopped") / "run", references["full"]
    return killed_when(reference, out, reference.changes // 2, lambda run: len(sealed(run)) == 2)


@pytest.fixture(scope="module")
def trained(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run that was killed when its training was done."""
    out, reference = tmp_path_factory.mktemp("trained") / "run", references["full"]
    return killed_when(reference, out, reference.changes - 24, lambda run: "train" in RunFolder(run.out).finished())


def sealed(run: Run) -> list[Path]:
    """Return the checkpoints with a manifest, the newest first."""
    manifests = RunFolder(run.out).checkpoints.glob(f"checkpoint-*/{MANIFEST}")
    return sorted((path.parent for path in manifests), key=step_of, reverse=True)


def truncate(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def flip_a_byte(checkpoint: Path) -> None:
    flip(checkpoint / "optimizer.pt", 5000)


def lose_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, lose_manifest])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    references: dict[str, Reference], stopped: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = references["full"].again(tmp_path / "run")
    shutil.copytree(stopped, run.out)
    damage(sealed(run)[0])
    assert end(run, str) == 0
    check_same(run, references["full"])


def test_two_damaged_checkpoints_start_the_training_anew(
    references: dict[str, Reference], stopped: Path, tmp_path: Path
) -> None:
    run = references["full"].again(tmp_path / "run")
    shutil.copytree(stopped, run.out)
    for checkpoint in sealed(run):
        truncate(checkpoint)
    assert end(run, str) == 0
    check_same(run, references["full"])


def test_the_proof_of_a_finished_run_that_was_altered_is_not_told_again(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    run = references["full"].again(Path(shutil.copytree(references["full"].run.out, tmp_path / "run")))
    proof = run.out / "proof.json"
    assert run.go() == run.out / "model"
    proof.write_text(proof.read_text().replace('"sites"', '"sides"', 1) + " ")
    with pytest.raises(CheckpointError, match="what phase 'prove' wrote was altered since"):
        run.go()


def test_the_state_of_random_numbers_matters(references: dict[str, Reference], stopped: Path, tmp_path: Path) -> None:
    """Without it the run ends elsewhere: the tests above would notice."""
    run = references["full"].again(tmp_path / "run")
    shutil.copytree(stopped, run.out)
    (sealed(run)[0] / "rng_state.pth").unlink()
    seal(sealed(run)[0])
    assert end(run, str) == 0
    assert left(run)["model/model.safetensors"] != left(references["full"].run)["model/model.safetensors"]


@pytest.mark.parametrize("number", range(2, 25, 3))
def test_killed_between_training_and_the_end(
    references: dict[str, Reference], trained: Path, tmp_path: Path, number: int
) -> None:
    run = references["full"].again(tmp_path / "run")
    shutil.copytree(trained, run.out)
    assert end(run, partial(kill_at, run.out, number)) == SIGKILL
    assert end(run, str) == 0
    check_same(run, references["full"])
