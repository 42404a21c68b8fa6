"""What a process does before anything else: it opens the standard descriptors and takes charge of
its signals and of garbage collection. `serve` keeps this until its own signal handlers are set.
Nothing is imported here that takes time: a signal before `prepare` finds Python's own handlers.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)

MAX_END_SECONDS = 10  # for the end of a process

_handlers: dict[int, Any] = {}  # those that `prepare` replaced, by signal
_collects = gc.isenabled()


def prepare() -> None:
    """Open the closed ones of descriptors 0 to 2 on /dev/null, so that the database does not become
    standard error. From now on SIGINT and SIGTERM end the process at once and silently, and SIGHUP
    waits. No garbage is collected: loading the program makes none to speak of."""
    _open_standard_descriptors()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    for number in ENDING:
        _handlers[number] = signal.signal(number, _end)
    gc.disable()


def _open_standard_descriptors() -> None:
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # each new descriptor is the lowest that is free
        descriptor = os.dup(descriptor)
    os.close(descriptor)


def _end(number: int, _: FrameType | None) -> None:
    """End as a process without a handler does. The first process of a container has no such default
    action, so the exit status says the same there."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def restore() -> None:
    """Handle signals and collect garbage as other programs do: for commands."""
    for number, handler in _handlers.items():
        signal.signal(number, handler)
    _go_on()


def finish() -> None:
    """End the start of `serve`, whose own handlers are set. What is there now stays, so it is no
    garbage: to look through it at each full collection would take 25 ms."""
    gc.freeze()
    _go_on()


def _go_on() -> None:
    """Collect garbage, and let SIGHUP come through, also one that came since `prepare`."""
    if _collects:
        gc.enable()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def end_soon(status: int) -> None:
    """End the process with a status if it has not ended by itself in MAX_END_SECONDS: a disk may
    never answer again."""
    timer = threading.Timer(MAX_END_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
