"""Errors that no code handles, and what libraries log: the log gets their type and the places in
the code that they passed through.

Python and its libraries would print the error's message, and often the value that it is about:
either can quote a prompt. Everything that they would print goes through here instead, so that it
does not depend on the place where an error is raised."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import TextIO

from redbtc.telemetry import LOG, UNEXPECTED, log, shown_error


class LibraryHandler(logging.Handler):
    """The handler of what libraries log, asyncio's reports of unhandled errors included."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log who said something, and where in the code. The text itself can quote content."""
        error = record.exc_info[1] if record.exc_info else None
        level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
        place = _place(record.pathname, record.lineno)
        log(level, UNEXPECTED, logger=record.name, place=place, **shown_error(error))


def log_unexpected_errors() -> None:
    """Send everything that Python and its libraries would print on standard error to the log."""
    logging.getLogger().addHandler(LibraryHandler())
    sys.excepthook = _log_end
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_end_of_thread
    warnings.showwarning = _log_warning


def _place(path: str, line: int) -> str:
    return f"{'/'.join(Path(path).parts[-2:])}:{line}"


def _log_end(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    """Log the error that ends the process."""
    log(logging.CRITICAL, UNEXPECTED, **shown_error(error))
    LOG.flush()


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Log an error in a place where it can't be raised, such as the end of an object."""
    log(logging.ERROR, UNEXPECTED, **shown_error(unraisable.exc_value))


def _log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    """Log the error that ends a thread."""
    name = ended.thread.name if ended.thread else None
    log(logging.ERROR, UNEXPECTED, thread=name, **shown_error(ended.exc_value))


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a warning of Python or of a library."""
    log(logging.WARNING, "warning", kind=category.__name__, place=_place(filename, lineno))
