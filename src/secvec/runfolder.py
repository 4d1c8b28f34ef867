"""The run folder of `train`: what the run is, which phases are finished, one process at a time; no torch."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secvec.atomic import write_json
from secvec.errors import CheckpointError, UsageError
from secvec.tripwire import read_json

VERSION = 1
_LOCK = "lock"


@dataclass(frozen=True)
class Phase:
    """A finished phase. seconds: of the process that finished it; digest: of what it wrote, "" where there is none."""

    seconds: float
    digest: str


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies; `out` is the folder the user named."""

    out: Path

    @property
    def identity(self) -> Path:
        return self.out / "run.json"

    @property
    def state(self) -> Path:
        return self.out / "state.json"

    @property
    def metrics(self) -> Path:
        return self.out / "metrics.jsonl"

    @property
    def proof(self) -> Path:
        return self.out / "proof.json"

    def vector(self, number: int) -> Path:
        """The `number`th vector as calibrated for this run."""
        return self.out / f"vector-{number}.safetensors"

    @property
    def work(self) -> Path:
        """What is deleted at the end."""
        return self.out / "work"

    @property
    def folded(self) -> Path:
        return self.work / "folded"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def trained(self) -> Path:
        return self.work / "trained"

    @property
    def unproved(self) -> Path:
        """The result until its proof is done."""
        return self.work / "unproved"

    def result(self, method: str) -> Path:
        return self.out / ("adapter" if method == "lora" else "model")

    def finished(self) -> dict[str, Phase]:
        """Return the finished phases. Raises CheckpointError when their record cannot be read."""
        if not self.state.exists():
            return {}
        document = read_json(self.state)
        try:
            return {name: Phase(**phase) for name, phase in document["phases"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.state}: expected the finished phases, found {error!r}; start anew in another folder"
            ) from error

    def phase(self, name: str, work: Callable[[], str], check: Callable[[], str] | None = None) -> None:
        """Do one phase, unless it is finished; `work` returns the digest of what it wrote.

        check: returns the digest of what a finished phase left. Raises CheckpointError when that was altered.
        """
        finished = self.finished()
        if name in finished:
            if check is not None and (found := check()) != finished[name].digest:
                raise CheckpointError(
                    f"{self.out}: what phase {name!r} wrote was altered since: expected {finished[name].digest!r}, "
                    f"found {found!r}; start anew in another folder"
                )
            return
        started = time.monotonic()
        digest = work()
        finished[name] = Phase(round(time.monotonic() - started, 3), digest)
        phases = {key: asdict(phase) for key, phase in finished.items()}
        write_json(self.state, {"version": VERSION, "phases": phases})

    def delete_work(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


@contextmanager
def locked(out: Path) -> Generator[None]:
    """Create the folder and keep other processes out. Raises UsageError when one is in it, also on another thread."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{out}: another process is working in this run folder; wait for it, or name another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def refuse_used(out: Path) -> None:
    """Raise UsageError when `out` holds anything: a run starts in a new or empty folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder for the run, found a file; name another one")
    content = sorted(path.name for path in out.iterdir() if path.name != _LOCK) if out.is_dir() else []
    if content:
        raise UsageError(
            f"{out}: expected a new or empty folder, found {', '.join(content[:3])}; "
            "name another one, or go on with this run (--resume)"
        )


def open_run(out: Path, identity: Mapping[str, Any], *, resume: bool) -> RunFolder:
    """Start a run, or go on with one that is the same in every setting, file and model.

    A folder in which a run was killed before it wrote anything is a new one. Raises UsageError on a used folder
    without `resume`, and when the run there is another one, naming what differs.
    """
    run = RunFolder(out)
    if not resume or not run.identity.exists():
        refuse_used(out)
        write_json(run.identity, {"format": "secvec.run", "version": VERSION, **identity})
        return run
    there = read_json(run.identity)
    differing = [key for key, value in identity.items() if key != "versions" and there.get(key) != value]
    if differing:
        raise UsageError(f"{out}: cannot go on with this run: {_difference(differing[0], there, identity)}")
    return run


def _difference(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    old, new = there.get(key), here[key]
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next((name for name in new if old.get(name) != new[name]), "")
        if inner:
            return _difference(inner, old, new)
    return f"{key} was {old!r} and is now {new!r}; give what it was started with, or name another folder"
