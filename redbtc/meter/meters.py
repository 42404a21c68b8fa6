"""The interface of all meters, and the meter of JSON answers."""

from __future__ import annotations

from collections.abc import Generator

from redbtc.meter.answers import MAX_AT_ONCE, JSONText, result_of
from redbtc.meter.report import Report


class Meter:
    """Meters an answer. `ended` is True once the answer has ended for the client; then, and after
    `finish`, `rest` returns the bytes that wait for the row. While it is `ending`, the event that
    ends it has come, but more usage may follow. `steps`, `finishing` and `tearing` do long work in
    small steps; `feed`, `finish` and `tear` do the same at once."""

    report: Report
    ended = False
    ending = False
    # `feed` is fast enough for chunks of up to so many bytes; larger ones are for `steps`. 0: any
    # chunk may take long, and so may the end: use `steps`, `finishing` and `tearing`.
    at_once = MAX_AT_ONCE

    def steps(self, chunk: bytes) -> Generator[None, None, bytes]:
        """Take the next bytes of the answer; return what may be sent on now."""
        raise NotImplementedError

    def finishing(self) -> Generator[None, None, None]:
        """Note that the upstream has sent everything."""
        yield from ()

    def tearing(self) -> Generator[None, None, None]:
        """Note that the answer was cut off: what it has said so far counts."""
        yield from ()

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the answer; return what may be sent on now."""
        return result_of(self.steps(chunk))

    def finish(self) -> None:
        """Note that the upstream has sent everything."""
        result_of(self.finishing())

    def tear(self) -> None:
        """Note that the answer was cut off: what it has said so far counts."""
        result_of(self.tearing())

    def rest(self) -> bytes:
        """Return the bytes that wait for the row, once."""
        return b""


class JSONMeter(Meter):
    """Meters an answer that is one JSON text. Its last byte is what ends it."""

    def __init__(self, images: bool) -> None:
        self.report = Report(images)
        self.ended = False
        self._text = JSONText()
        self._held = b""

    def steps(self, chunk: bytes) -> Generator[None, None, bytes]:
        """Take the next bytes, in small steps; return all but the last byte so far."""
        yield from self._text.steps(chunk)
        self.at_once = 0 if self._text.is_long else MAX_AT_ONCE
        passed, self._held = self._held + chunk[:-1], chunk[-1:]
        return passed

    def finishing(self) -> Generator[None, None, None]:
        answer = yield from self._text.answer()
        if answer:
            yield from self.report.note(answer)
        else:  # the upstream has ended it too early
            yield from self.tearing()
        self.ended = True

    def tearing(self) -> Generator[None, None, None]:
        answer = yield from self._text.torn()
        if answer:
            yield from self.report.note(answer, torn=True)

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held
