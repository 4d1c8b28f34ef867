"""What a launcher (torchrun, accelerate) says of the processes that it started; no torch."""

import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from secvec.errors import UsageError

_GRACE_S = 5.0
"""Far longer than a launcher takes to notice that a process has ended, and to end the others."""


def process_count() -> int:
    """Return how many processes were started to work together; 1 without a launcher.

    A cluster may set WORLD_SIZE for a whole machine: only a launcher sets LOCAL_RANK, for each process.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Tell whether this is the process that writes and prints."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def refuse_several(command: str) -> None:
    """Raise UsageError when a launcher started several processes of a command that works in one."""
    if (count := process_count()) > 1:
        raise UsageError(
            f"secvec {command}: expected one process, found WORLD_SIZE={count}: each would do the same work and write "
            "the same files; start it without a launcher"
        )


@contextmanager
def speaking_once() -> Generator[None]:
    """Let the main process speak for all: the others print no results, and wait before they print an error.

    Where the main process fails too, the launcher ends them while they wait, and only its message is seen.
    """
    if is_main():
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        spoken, sys.stdout = sys.stdout, nowhere
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, SystemExit) and not error.code):
                time.sleep(_GRACE_S)
            raise
        finally:
            sys.stdout = spoken
