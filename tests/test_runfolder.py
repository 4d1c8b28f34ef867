"""The run folder: one run, one process at a time, phases that are finished once and checked when a run goes on."""

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from secvec.errors import CheckpointError, ProofError, UsageError
from secvec.runfolder import RunFolder, digest_tree, locked, open_run, resumable

IDENTITY: dict[str, Any] = {
    "data": "sha256:d",
    "vectors": ["sha256:v"],
    "config": {"lr": 1e-3, "epochs": 3, "trainer": {"betas": (0.9, 0.99)}},
    "versions": {"torch": "2"},
}


def changed(**values: Any) -> dict[str, Any]:
    return IDENTITY | values


def fail() -> str:
    raise AssertionError("a finished phase was done again")


def test_a_run_goes_on_only_when_asked_to(tmp_path: Path) -> None:
    open_run(tmp_path, IDENTITY, resume=False)
    with pytest.raises(UsageError, match=r"found run.json; name another one, or go on with this run"):
        open_run(tmp_path, IDENTITY, resume=False)
    assert open_run(tmp_path, changed(versions={"torch": "3"}), resume=True) == RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("here", "told"),
    [
        (changed(data="sha256:e"), "data was 'sha256:d' and is now 'sha256:e'"),
        (changed(vectors=[]), "vectors was ['sha256:v'] and is now []"),
        (changed(config={**IDENTITY["config"], "lr": 1e-4}), "config.lr was 0.001 and is now 0.0001"),
        (changed(config={**IDENTITY["config"], "trainer": {}}), "config.trainer.betas was [0.9, 0.99] and is now None"),
    ],
)
def test_another_run_is_refused_naming_what_differs(tmp_path: Path, here: dict[str, Any], told: str) -> None:
    open_run(tmp_path, IDENTITY, resume=False)
    with pytest.raises(UsageError) as caught:
        open_run(tmp_path, here, resume=True)
    assert told in str(caught.value) and "name another folder" in str(caught.value)


def test_the_first_three_differences_are_named(tmp_path: Path) -> None:
    open_run(tmp_path, IDENTITY, resume=False)
    here = {"data": 1, "vectors": 2, "config": {**IDENTITY["config"], "lr": 3, "epochs": 4}}
    with pytest.raises(UsageError, match=r"data was .*; vectors was .*; config.lr was .* and 1 more; give"):
        open_run(tmp_path, here, resume=True)


def test_a_run_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": "secvec.run", "version": 2}')
    with pytest.raises(UsageError, match="version 2"):
        open_run(tmp_path, IDENTITY, resume=True)


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"new or empty folder, found thesis.txt"):
            open_run(tmp_path, IDENTITY, resume=resume)


def test_a_folder_killed_before_it_held_anything_is_new(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / ".run.json.abc.tmp").write_text("{")
    for resume in (True, False):
        run = open_run(tmp_path, IDENTITY, resume=resume)
        run.identity.unlink()
    run.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="found a file"), locked(tmp_path / "run"):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    enter = "import sys, pathlib; from secvec.runfolder import locked; locked(pathlib.Path(sys.argv[1])).__enter__()"
    command = [sys.executable, "-c", enter, str(tmp_path)]
    with locked(tmp_path):
        with pytest.raises(UsageError, match="another process is working"), locked(tmp_path):
            pass
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode == 1 and "another process is working" in other.stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_a_finished_phase_is_not_done_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.phase("fold", lambda: "a")
    run.phase("fold", fail)
    run.phase("fold", fail, lambda: "a")
    assert run.finished()["fold"].digest == "a"


def test_a_phase_that_failed_is_done_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(AssertionError):
        run.phase("fold", fail)
    run.phase("fold", lambda: "b")
    assert run.finished()["fold"].digest == "b"


def test_what_a_phase_left_and_was_altered_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.phase("fold", lambda: "a")
    with pytest.raises(CheckpointError, match="'fold' wrote was altered since: expected 'a', found 'b'"):
        run.phase("fold", fail, lambda: "b")


def test_a_damaged_record_of_phases_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for text in ("{", "{}", '{"phases": {"fold": 3}}', '{"phases": 3}'):
        run.state.write_text(text)
        with pytest.raises(CheckpointError, match=r"state.json"):
            run.finished()


def test_a_folders_digest_is_of_every_byte_but_the_card(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights").write_bytes(b"abc")
    before = digest_tree(tmp_path)
    (tmp_path / "README.md").write_text("edited")
    assert digest_tree(tmp_path) == before
    (tmp_path / "inner" / "weights").rename(tmp_path / "inner" / "other")
    renamed = digest_tree(tmp_path)
    (tmp_path / "inner" / "other").write_bytes(b"abd")
    assert len({before, renamed, digest_tree(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), "No space left .* free some space, then go on with"),
        (OSError(errno.EROFS, "Read-only file system", "f"), "make the folder writable, then go on with --resume"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "make the folder writable"),
        (RuntimeError("[enforce fail] . unexpected pos 64 vs 0"), "free some space"),
        (SafetensorError("I/O error: File too large (os error 27)"), "free some space"),
    ],
)
def test_a_write_that_failed_says_how_to_go_on(tmp_path: Path, error: Exception, told: str) -> None:
    with pytest.raises(CheckpointError, match=told), resumable(tmp_path):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), FileNotFoundError(2, "none", "f"), ProofError("no")])
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, resumable(tmp_path):
        raise error
    assert caught.value is error


def test_an_interrupt_stays_one_and_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="--resume"), resumable(tmp_path):
        raise KeyboardInterrupt
