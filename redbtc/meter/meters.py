"""The interface of all meters, and the meter of JSON answers."""

from __future__ import annotations

import sys
from typing import Literal

from redbtc.meter.answers import MAX_AT_ONCE, JSONText
from redbtc.meter.report import Report
from redbtc.steps import Steps, result_of

MAX_TAIL = 4096

MeterState = Literal[  # how far an answer has come
    "open",  # more of the answer is expected
    "ending",  # the event that ends it has come, but more usage may follow; it may also go on
    "ended",  # for the client
]


class Meter:
    """The interface of the meter of one answer.

    When the state is "ended", and after `finish`, `rest` returns the bytes that wait until the row
    is committed. `steps`, `finish_steps` and `cut_off_steps` do long work in small steps; `feed`,
    `finish` and `cut_off` do the same at once.
    """

    report: Report
    size = 0  # bytes of an answer that is no stream, as far as they are counted
    state: MeterState = "open"
    is_cut_off = False  # the end of a JSON answer is missing; known after `finish`
    # The size in bytes up to which a chunk may be given to `feed`; larger ones take long and must
    # be given to `steps`. If it is 0, any chunk and the end can take long: use `steps`,
    # `finish_steps` and `cut_off_steps`.
    at_once = MAX_AT_ONCE

    def steps(self, chunk: bytes) -> Steps[bytes]:
        """Take the next bytes of the answer; return what may be sent on now."""
        raise NotImplementedError

    def finish_steps(self) -> Steps[None]:
        """Note that the upstream has sent everything."""
        yield from ()

    def cut_off_steps(self) -> Steps[None]:
        """Note that the answer was cut off: what it has reported so far counts."""
        yield from ()

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the answer; return what may be sent on now."""
        return result_of(self.steps(chunk))

    def finish(self) -> None:
        """Note that the upstream has sent everything."""
        result_of(self.finish_steps())

    def cut_off(self) -> None:
        """Note that the answer was cut off: what it has reported so far counts."""
        result_of(self.cut_off_steps())

    def rest(self) -> bytes:
        """Return the bytes that wait until the row is committed; nothing the second time."""
        return b""


class PlainMeter(Meter):
    """Meters an answer that is neither JSON nor events, such as audio or subtitles: it counts the
    bytes and keeps the last of them. Its last byte is held back."""

    at_once = sys.maxsize

    def __init__(self) -> None:
        self.report = Report(images=False)
        self.tail = b""  # its last bytes, at most MAX_TAIL
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes; return all bytes but the last one, which may be the end."""
        self.size += len(chunk)
        self.tail = (self.tail + chunk[-MAX_TAIL:])[-MAX_TAIL:]
        passed, self._held = self._held + chunk[:-1], chunk[-1:]
        return passed

    def finish(self) -> None:
        self.state = "ended"

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held


class JSONMeter(Meter):
    """Meters an answer that is one JSON text. It ends with its last byte, which is held back."""

    def __init__(self, images: bool) -> None:
        self.report = Report(images)
        self._text = JSONText()
        self._held = b""

    def steps(self, chunk: bytes) -> Steps[bytes]:
        """Take the next bytes, in small steps; return all bytes but the last one, which may be the
        end."""
        yield from self._text.steps(chunk)
        self.size += len(chunk)
        self.at_once = 0 if self._text.is_long else MAX_AT_ONCE
        passed, self._held = self._held + chunk[:-1], chunk[-1:]
        return passed

    def finish_steps(self) -> Steps[None]:
        answer = yield from self._text.answer()
        if answer:
            yield from self.report.note(answer)
        else:  # the upstream has ended the answer too early
            self.is_cut_off = True
            yield from self.cut_off_steps()
        self.state = "ended"

    def cut_off_steps(self) -> Steps[None]:
        answer = yield from self._text.partial_answer()
        if answer:
            yield from self.report.note(answer, cut_off=True)

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held
