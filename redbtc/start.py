"""The first steps of a process: standard descriptors, signals, core dumps and garbage collection.

`serve` keeps what is set here until its own signal handlers are set. Nothing is imported here that
takes time: a signal before `prepare` finds Python's own handlers.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import threading
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)
WHEN_SERVING = (signal.SIGHUP, signal.SIGUSR2)  # signals for a process that serves

PR_SET_DUMPABLE = 4  # of prctl(2)
MAX_END_SECONDS = 10  # until a process has ended, after which it is killed

_handlers: dict[int, Any] = {}  # those that `prepare` replaced, by signal
_collects = gc.isenabled()


def prepare() -> None:
    """Open those of the descriptors 0 to 2 that are closed on /dev/null, so that the database does
    not become standard error. From now on SIGINT and SIGTERM end the process at once and silently,
    and SIGHUP and SIGUSR2 wait. No core is dumped. No garbage is collected: loading the program
    makes hardly any."""
    _open_standard_descriptors()
    signal.pthread_sigmask(signal.SIG_BLOCK, WHEN_SERVING)
    for number in ENDING:
        _handlers[number] = signal.signal(number, _end)
    _forbid_core_dumps()
    gc.disable()


def _open_standard_descriptors() -> None:
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # each new descriptor is the lowest that is free
        descriptor = os.dup(descriptor)
    os.close(descriptor)


def _forbid_core_dumps() -> None:
    """Keep the process's memory, which has prompts, out of files: no core is dumped when it
    crashes. The limit alone does not keep Linux from piping a core to a program (core(5)); a
    process that is not dumpable does, and only root can read its memory or attach a debugger."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes  # here: it takes 3 ms to load

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _end(number: int, _: FrameType | None) -> None:
    """End the process by the signal, as without a handler. The first process of a container can't
    be ended so: its exit status says the same."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def restore_signals() -> None:
    """Handle signals and collect garbage as other programs do. Commands need nothing else."""
    for number, handler in _handlers.items():
        signal.signal(number, handler)
    _resume()


def finish() -> None:
    """End the start of `serve`, whose own handlers are set. Exempt the objects that exist now from
    garbage collection: they stay, and looking through them takes 25 ms at each full collection."""
    gc.freeze()
    _resume()


def _resume() -> None:
    """Collect garbage, and deliver SIGHUP and SIGUSR2, also if they have come since `prepare`."""
    if _collects:
        gc.enable()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WHEN_SERVING)


def end_soon(status: int) -> None:
    """End the process with this exit status if it has not ended by itself within MAX_END_SECONDS:
    a disk may never answer again."""
    timer = threading.Timer(MAX_END_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
