"""Run a command in a process of its own that is killed (kill -9) at a chosen instant."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def killed_at(instant: int, work: Callable[[], Any], name: str = "") -> bool:
    """Fork, do the work there and kill it when the `instant`-th file is about to be opened, made, renamed or removed.

    name: count only paths with this in them. Returns whether it was killed: False when the work was over before. The
    forking process must have no threads, of torch neither.
    """
    if (child := os.fork()) == 0:
        left = [instant]

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in _EVENTS and name in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})
