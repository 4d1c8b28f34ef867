"""A fold or unfold that is killed at any instant goes on from what is on the disk to the byte."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import flip, llama, random_vector, save_model
from kills import killed_at
from transformers import AutoModelForCausalLM

from secvec.errors import ArtifactError
from secvec.fold import fold
from secvec.headers import read_index
from secvec.provenance import digest_model
from secvec.unfold import unfold
from secvec.vector import SecurityVector


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(llama(), tmp_path / "base", shards=True)


@pytest.fixture
def vector(base: Path) -> SecurityVector:
    return random_vector(llama(), base=digest_model(base))


def everything(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder; a mark names its own folder."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"config.json": files["config.json"].replace(str(folder).encode(), b"")}


def partial(out: Path) -> Path:
    (found,) = out.parent.glob(f"{out.name}.partial-*")
    return found


def noted(out: Path) -> list[str]:
    """Return the names in the journal: a tensor stands there as often as it was computed."""
    return [line.split('"')[1] for line in (partial(out) / "journal").read_text().splitlines()[1:]]


@pytest.fixture
def trained(tmp_path: Path, base: Path, vector: SecurityVector) -> Path:
    """Return what training made of a folded model; one block it left alone."""
    fold(base, [vector], tmp_path / "folded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    for name, parameter in model.named_parameters():
        parameter.data += 2**-8 * (".0." not in name)
    return save_model(model, tmp_path / "trained", shards=True)


@pytest.fixture(params=["fold", "unfold"])
def work(request: pytest.FixtureRequest, base: Path, vector: SecurityVector) -> Callable[[Path], object]:
    """Return what writes a folder."""
    if request.param == "fold":
        return lambda out: fold(base, [vector], out)
    source: Path = request.getfixturevalue("trained")
    return lambda out: unfold(source, out)


def test_what_is_killed_at_any_instant_goes_on_to_the_same_bytes(
    tmp_path: Path, work: Callable[[Path], object]
) -> None:
    work(tmp_path / "whole")
    expected, instant, out = everything(tmp_path / "whole"), 1, tmp_path / "out"
    while killed_at(instant, lambda: work(out)):
        if not out.exists():
            work(out)
        assert everything(out) == expected, instant
        assert not list(tmp_path.glob("*.partial-*"))
        shutil.rmtree(out)
        instant += 7
    assert instant > 100


def test_what_was_done_before_a_kill_is_not_computed_again(tmp_path: Path, work: Callable[[Path], object]) -> None:
    out, counts = tmp_path / "out", [0]
    while killed_at(6, lambda: work(out), "journal"):
        assert len(set(noted(out))) == len(noted(out)) > counts[-1]
        counts.append(len(noted(out)))
    assert len(counts) > 2
    assert out.exists()


@pytest.fixture
def killed(tmp_path: Path, base: Path, vector: SecurityVector) -> Path:
    """Return the folder of a fold that was killed when all tensors were folded."""
    out = tmp_path / "out"
    assert killed_at(1, lambda: fold(base, [vector], out), "record.json")
    assert sorted(noted(out)) == sorted(f"{site}.weight" for site in vector.sites)
    return out


@pytest.mark.parametrize("damaged", ["weights", "journal"])
def test_what_is_not_there_to_the_byte_is_folded_again(
    killed: Path, base: Path, vector: SecurityVector, damaged: str
) -> None:
    before, journal = noted(killed), partial(killed) / "journal"
    entry = read_index(base)[before[-1]]
    if damaged == "weights":
        flip(partial(killed) / entry.file.name, entry.start + 5)
    else:
        journal.write_text(journal.read_text()[:-70])
    assert killed_at(1, lambda: fold(base, [vector], killed), "record.json")
    assert noted(killed) == [*before, before[-1]]
    fold(base, [vector], killed)
    fold(base, [vector], killed.with_name("whole"))
    assert everything(killed) == everything(killed.with_name("whole"))


@pytest.mark.parametrize("changed", ["vector", "config"])
def test_a_fold_of_something_else_starts_anew(killed: Path, base: Path, vector: SecurityVector, changed: str) -> None:
    if changed == "vector":
        vector = replace(vector, scale=vector.scale * 2)
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    fold(base, [vector], killed)
    fold(base, [vector], killed.with_name("whole"))
    assert everything(killed) == everything(killed.with_name("whole"))


def test_a_base_changed_after_a_kill_is_refused(killed: Path, base: Path, vector: SecurityVector) -> None:
    entry = read_index(base)[noted(killed)[0]]
    flip(base / entry.file.name, entry.start + 5)
    with pytest.raises(ArtifactError, match="was fitted on the model"):
        fold(base, [vector], killed)
    assert {path.name for path in killed.parent.iterdir()} == {"base"}


def test_ctrl_c_leaves_what_the_next_fold_goes_on_with(tmp_path: Path, base: Path, vector: SecurityVector) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(base, [vector], tmp_path / "out", progress=stop)
    assert len(noted(tmp_path / "out")) >= 13
    fold(base, [vector], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
