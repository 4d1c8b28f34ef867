"""The run folder of `train`: what the run is, which phases are finished, one process at a time; no torch."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from secvec.atomic import write_json
from secvec.errors import CheckpointError, SecvecError, UsageError
from secvec.provenance import digest_file
from secvec.tripwire import read_json

FORMAT = "secvec.run"
SCAN = "secvec.scan"
EVALUATION = "secvec.eval"
DEMO = "secvec.demo"
VERSION = 1
# People edit the card of a finished model; no phase depends on it.
CARD = "README.md"
_LOCK = "lock"
# What a kill leaves of a file that was being written (`secvec.atomic`).
_HALF_WRITTEN = ".*.tmp"
_SHOWN = 3


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

    @property
    def covered(self) -> Path:
        """A line for each row of which not all is trained on (`secvec.covered`)."""
        return self.out / "covered.jsonl"

    def vector(self, number: int) -> Path:
        """The `number`th vector as calibrated for this run."""
        return self.out / f"vector-{number}.safetensors"

    @property
    def work(self) -> Path:
        """What is deleted at the end."""
        return self.out / "work"

    @property
    def recalled(self) -> Path:
        """The rows that the vectors brought back (`secvec.recall`)."""
        return self.work / "recalled.json"

    @property
    def rehearsed(self) -> Path:
        """The conversations that take the places of covered rows (`secvec.rehearsal`)."""
        return self.work / "rehearsed.json"

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

    @property
    def settling(self) -> Path:
        """What the training after the vector was taken out works with: checkpoints, metrics and weights."""
        return self.work / "settling"

    @property
    def settled(self) -> Path:
        """The result that was settled, until its proof is done."""
        return self.work / "settled"

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
        if not self.is_finished(name, check):
            started = time.monotonic()
            digest = work()
            self.record(name, started, digest)

    def is_finished(self, name: str, check: Callable[[], str] | None = None) -> bool:
        """Tell whether a phase is finished. Raises CheckpointError when what it left was altered."""
        finished = self.finished()
        if name in finished and check is not None and (found := check()) != finished[name].digest:
            raise CheckpointError(
                f"{self.out}: what phase {name!r} wrote was altered since: expected {finished[name].digest!r}, "
                f"found {found!r}; start anew in another folder"
            )
        return name in finished

    def record(self, name: str, started_s: float, digest: str) -> None:
        """Write down that a phase, which started at `started_s` of the monotonic clock, is finished."""
        finished = self.finished()
        finished[name] = Phase(round(time.monotonic() - started_s, 3), digest)
        phases = {key: asdict(phase) for key, phase in finished.items()}
        write_json(self.state, {"version": VERSION, "phases": phases})

    def clean(self) -> None:
        """Delete the work, and what kills left of files that were being written."""
        shutil.rmtree(self.work, ignore_errors=True)
        for path in self.out.glob(_HALF_WRITTEN):
            path.unlink()


def fresh(folder: Path) -> Path:
    """Remove what a killed run left; the folder itself is made by whoever fills it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def digest_tree(folder: Path) -> str:
    """Return the digest of every file in a folder, by name, but for its card."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD):
        digest.update(json.dumps([str(path.relative_to(folder)), digest_file(path)]).encode() + b"\n")
    return "sha256:" + digest.hexdigest()


@contextmanager
def locked(out: Path) -> Generator[None]:
    """Create the folder and keep other processes out. Raises UsageError when one is in it, also on another thread."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder for the run, found a file; name another one")
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


@contextmanager
def resumable(out: Path, *, flag: str = " with --resume (resume=True)") -> Generator[None]:
    """Say how to go on when the disk is full or read-only, or when Ctrl-C ends the run; `flag`: what it then needs.

    Raises CheckpointError for a write that failed, whichever library tried it, and KeyboardInterrupt with a message.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"{out}: stopped; the same command{flag} goes on") from interrupt
    except (SecvecError, OSError, RuntimeError, SafetensorError) as error:
        if (what := _write_error(error)) is None:
            raise
        raise CheckpointError(f"{out}: a file could not be written: {what}, then go on{flag}") from error


def open_run(out: Path, identity: Mapping[str, Any], *, resume: bool, format: str = FORMAT) -> RunFolder:
    """Start a run, or go on with one that is the same in every setting, file and model.

    A folder in which a run was killed before it wrote anything is a new one. Raises UsageError on a used folder
    without `resume`, and when the run there is another one, naming what differs.
    """
    run = RunFolder(out)
    if not resume or not run.identity.exists():
        _refuse_used(out)
        write_json(run.identity, {"format": format, "version": VERSION, **identity})
        return run
    there = read_json(run.identity)
    if (there.get("format"), there.get("version")) != (format, VERSION):
        found = f"{there.get('format')!r} version {there.get('version')!r}"
        raise UsageError(f"{out}: expected a run of format {format!r} version {VERSION}, found {found}; start anew")
    # As the file holds it: tuples are lists there.
    here = json.loads(json.dumps({key: value for key, value in identity.items() if key != "versions"}))
    if differing := list(_differences({key: there.get(key) for key in here}, here)):
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UsageError(
            f"{out}: cannot go on with this run: {'; '.join(differing[:_SHOWN])}{more}; "
            "give what it was started with, or name another folder"
        )
    return run


def _refuse_used(out: Path) -> None:
    """Raise UsageError when `out` holds anything: a run starts in a new or empty folder."""
    names = [path.name for path in out.iterdir() if path.name != _LOCK and not path.match(_HALF_WRITTEN)]
    if names:
        go_on = ", or go on with this run (--resume)" if RunFolder(out).identity.exists() else ""
        raise UsageError(
            f"{out}: expected a new or empty folder, found {', '.join(sorted(names)[:_SHOWN])}; name another one{go_on}"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line for each entry that differs, by its name; entries of inner objects are `outer.inner`."""
    for key in [*here, *(key for key in there if key not in here)]:
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(cast(dict[str, Any], old), cast(dict[str, Any], new), f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old!r} and is now {new!r}"


def _write_error(error: BaseException | None) -> str | None:
    """Return what a failed write needs, or None for another error; torch and safetensors have words of their own."""
    text = str(error).strip().split("\n", 1)[0]
    if isinstance(error, SecvecError):
        inner = error.__cause__
        return _write_error(inner) if isinstance(inner, OSError) and inner.errno in _FULL else None
    if isinstance(error, OSError):
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{text}; make the folder writable"
        return f"{text}; free some space" if error.errno in _FULL else None
    return f"{text}; free some space" if any(words in text for words in _FULL_WORDS) else None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_FULL_WORDS = ("No space left", "File too large", "file write failed", "PytorchStreamWriter", "unexpected pos")
