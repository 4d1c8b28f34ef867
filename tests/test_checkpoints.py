"""A checkpoint is taken up only when a manifest, written last, vouches for every byte of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from secvec.checkpoints import MANIFEST, is_verified, newest_verified, prune, seal, step_of


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "inner").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(200)) + bytes([step]))
    (made / "inner" / "rng_state.pth").write_bytes(b"state")
    seal(made)
    return made


def truncate(made: Path) -> None:
    (made / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:-1])


def flip(made: Path) -> None:
    data = bytearray((made / "model.safetensors").read_bytes())
    data[100] ^= 1
    (made / "model.safetensors").write_bytes(data)


def flip_inside(made: Path) -> None:
    (made / "inner" / "rng_state.pth").write_bytes(b"statf")


def lose_manifest(made: Path) -> None:
    (made / MANIFEST).unlink()


def cut_manifest(made: Path) -> None:
    (made / MANIFEST).write_bytes((made / MANIFEST).read_bytes()[:40])


def other_manifest(made: Path) -> None:
    (made / MANIFEST).write_text("[]")


def lose(made: Path) -> None:
    (made / "model.safetensors").unlink()


def add(made: Path) -> None:
    (made / "optimizer.pt").write_bytes(b"half")


DAMAGE = [truncate, flip, flip_inside, lose_manifest, cut_manifest, other_manifest, lose, add]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    older, newer = checkpoint(tmp_path, 8), checkpoint(tmp_path, 10)
    assert newest_verified(tmp_path) == newer
    damage(newer)
    assert not is_verified(newer)
    assert newest_verified(tmp_path) == older
    assert not newer.exists()


def test_no_checkpoint_at_all_starts_anew(tmp_path: Path) -> None:
    assert newest_verified(tmp_path / "none") is None
    truncate(checkpoint(tmp_path, 2))
    assert newest_verified(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_steps_are_numbers_not_texts(tmp_path: Path) -> None:
    for step in (8, 10, 9):
        checkpoint(tmp_path, step)
    newest = newest_verified(tmp_path)
    assert newest is not None and step_of(newest) == 10


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "runs", "tmp-checkpoint-4"):
        (tmp_path / name).mkdir()
    checkpoint(tmp_path, 2)
    prune(tmp_path)
    assert newest_verified(tmp_path) == tmp_path / "checkpoint-2"
    assert len(list(tmp_path.iterdir())) == 4


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12").mkdir()
    prune(tmp_path)
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == [6, 10, 12]
