"""Move byte ranges between large files with several threads, and build folders that appear whole or not at all."""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import torch

from secvec.errors import CheckpointError

T = TypeVar("T")
Progress = Callable[[int, int], None]

# So that progress moves.
_COPY_BYTES = 64 << 20
_MAX_THREADS = 8
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


class Files:
    """Open files by path, each once; closed together."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, int] = {}

    def reader(self, path: Path) -> int:
        return self._descriptor(path, os.O_RDONLY)

    def writer(self, path: Path, size: int) -> int:
        """Create a file of `size` bytes, or take up one that is there; its ranges may then be written in any order.

        Space is taken at once: a full disk shows before the work, and ext4 then writes several times faster.
        """
        descriptor = self._descriptor(path, os.O_RDWR | os.O_CREAT)
        if size > 0:
            os.posix_fallocate(descriptor, 0, size)
        return descriptor

    def _descriptor(self, path: Path, flags: int) -> int:
        if path not in self._open:
            descriptor = os.open(path, flags, 0o666)
            self._stack.callback(os.close, descriptor)
            self._open[path] = descriptor
        return self._open[path]


class Meter:
    """Count bytes from several threads and report (done, total)."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._total_bytes, self._progress = total_bytes, progress
        self._done_bytes, self._lock = 0, Lock()

    def add(self, count_bytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done_bytes += count_bytes
            self._progress(self._done_bytes, self._total_bytes)


@dataclass(frozen=True)
class Copy:
    """A range of bytes to copy from one open file to another."""

    source: int
    source_start: int
    target: int
    target_start: int
    count_bytes: int

    def run(self, meter: Meter) -> None:
        """Copy in the kernel where the file systems allow it."""
        done = 0
        while done < self.count_bytes:
            copied = self._some(done)
            meter.add(copied)
            done += copied

    def _some(self, done: int) -> int:
        start, target, left = self.source_start + done, self.target_start + done, self.count_bytes - done
        try:
            copied = os.copy_file_range(self.source, self.target, min(left, _COPY_BYTES), start, target)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            data = memoryview(os.pread(self.source, min(left, 1 << 20), start))
            write_at(self.target, data, target)
            copied = len(data)
        if copied == 0:
            raise CheckpointError(f"expected {left} more bytes at {start}, found the file's end; fetch the model again")
        return copied


def read_at(descriptor: int, buffer: memoryview, start: int) -> None:
    """Fill a buffer from a file. Raises CheckpointError when the file ends before."""
    while buffer:
        count = os.preadv(descriptor, [buffer], start)
        if count == 0:
            raise CheckpointError(
                f"expected {len(buffer)} more bytes at {start}, found the file's end; was it truncated?"
            )
        buffer, start = buffer[count:], start + count


def write_at(descriptor: int, buffer: memoryview, start: int) -> None:
    while buffer:
        count = os.pwrite(descriptor, buffer, start)
        buffer, start = buffer[count:], start + count


@dataclass(frozen=True)
class Job(Generic[T]):
    """Something to do, and the open file it writes to, if any."""

    work: Callable[[], T]
    target: int | None = None


def run_jobs(jobs: Sequence[Job[T]]) -> list[T]:
    """Run the jobs on all cores and return their results in order; the first failure stops the rest.

    Jobs without a file go first, the others file by file in turns: two threads that write to one file wait for each
    other. Files are synced while others are written, so that little is left to wait for at the end.
    """
    threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    # torch counts its own threads per calling thread: one each, since the jobs already use every core.
    workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    syncer = _Syncer(Counter(job.target for job in jobs if job.target is not None))
    futures = {number: workers.submit(syncer.run, jobs[number]) for number in _in_turns(jobs)}
    try:
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        failed = [future for future in futures.values() if future.done() and future.exception() is not None]
        results = [future.result() for future in failed or [futures[number] for number in range(len(jobs))]]
        syncer.finish()
        return results
    finally:
        workers.shutdown(wait=True, cancel_futures=True)
        syncer.close()


def _in_turns(jobs: Sequence[Job[T]]) -> list[int]:
    """Return the jobs' numbers: those without a file, then the first of each file, the second of each, and so on."""
    before: Counter[int | None] = Counter()
    turns: list[int] = []
    for job in jobs:
        before[job.target] += job.target is not None
        turns.append(before[job.target])
    return sorted(range(len(jobs)), key=turns.__getitem__)


class _Syncer:
    """Sync each file from a thread of its own: while it is written, whenever the last sync is over, and at its end."""

    def __init__(self, left: dict[int, int]) -> None:
        self._left, self._lock = left, Lock()
        self._queued: set[int] = set()
        self._thread = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []

    def run(self, job: Job[T]) -> T:
        result = job.work()
        if (target := job.target) is not None:
            with self._lock:
                self._left[target] -= 1
                if target not in self._queued or self._left[target] == 0:
                    self._queued.add(target)
                    self._syncs.append(self._thread.submit(self._sync, target))
        return result

    def finish(self) -> None:
        for sync in self._syncs:
            sync.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _sync(self, target: int) -> None:
        with self._lock:
            self._queued.discard(target)
        os.fsync(target)


@contextmanager
def new_folder(out: Path, *, resume: bool = False) -> Generator[Path]:
    """Yield a folder `OUT.partial-PID` that becomes `out` at the end, or is removed on any failure.

    A kill leaves only a folder of that name. When its process is gone, the next run removes it; with `resume` it yields
    it again with all that is in it, and Ctrl-C leaves it too. Raises CheckpointError when `out` exists and is not an
    empty folder, or when it cannot be written (a full disk).
    """
    out = out.resolve()  # a link to a folder stays one
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"{out}: expected a new or an empty folder, found content there; name another one")
    partial = out.parent / f"{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _take_stale(out, partial if resume else None)
        partial.mkdir(exist_ok=resume)
        yield partial
        sync_tree(partial)
        partial.rename(out)
        sync(out.parent)
    except BaseException as error:
        if not (resume and isinstance(error, KeyboardInterrupt)):
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(_unwritable(out, error)) from error
        raise


def _unwritable(out: Path, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full; free some space or name a folder on another disk" if full else "check the folder"
    return f"{out}: could not be written, nothing was left there: {error}: {what}"


def _take_stale(out: Path, partial: Path | None) -> None:
    """Give one of the folders that killed runs left the name `partial`, if any is wanted; remove the others."""
    mark = f"{out.name}.partial-"
    for folder in list(out.parent.iterdir()):
        pid = folder.name.removeprefix(mark)
        if not folder.name.startswith(mark) or not pid.isdecimal() or (int(pid) != os.getpid() and _is_alive(int(pid))):
            continue
        if partial is not None and (folder == partial or not partial.exists()):
            # Another run may have been faster.
            with suppress(FileNotFoundError):
                folder.rename(partial)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
