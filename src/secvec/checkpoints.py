"""Checkpoints of a training run that can be trusted after a kill: a manifest, written last, vouches for every byte.

A trainer that is killed while it saves leaves a folder that looks whole. Only a folder whose manifest matches is
taken up again.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secvec.atomic import write_json
from secvec.errors import CheckpointError
from secvec.provenance import digest_file
from secvec.ranges import sync_tree
from secvec.tripwire import read_json

MANIFEST = "secvec_manifest.json"
VERSION = 1
_PREFIX = "checkpoint-"
_KEPT = 2


def seal(folder: Path) -> None:
    """Bring a finished checkpoint to the disk and vouch for it: name, size and digest of every file, written last."""
    sync_tree(folder)
    write_json(folder / MANIFEST, {"version": VERSION, "files": _describe(folder)})


def is_verified(folder: Path) -> bool:
    """Tell whether every byte of a checkpoint is what its manifest says, and nothing was added or lost."""
    try:
        manifest = read_json(folder / MANIFEST)
        return manifest == {"version": VERSION, "files": _describe(folder)}
    except (CheckpointError, OSError):
        return False


def newest_verified(folder: Path) -> Path | None:
    """Return the newest verified checkpoint in `folder`, or None; newer ones, all damaged, are deleted."""
    for path in reversed(_checkpoints(folder)):
        if is_verified(path):
            return path
        _delete(path)
    return None


def prune(folder: Path) -> None:
    """Delete all but the last two sealed checkpoints; the newest one may still turn out damaged."""
    sealed = [path for path in _checkpoints(folder) if (path / MANIFEST).exists()]
    for path in sealed[:-_KEPT]:
        _delete(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in the order of their steps."""
    if not folder.is_dir():
        return []
    names = [path for path in folder.iterdir() if path.name.startswith(_PREFIX)]
    return sorted((path for path in names if path.name.removeprefix(_PREFIX).isdecimal()), key=step_of)


def _describe(folder: Path) -> Mapping[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "digest": digest_file(path)} for path in files
    }


def _delete(path: Path) -> None:
    # The manifest goes first: a deletion that is cut short must not leave a folder that someone vouched for.
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
