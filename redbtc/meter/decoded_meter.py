"""The meter of compressed answers. An upstream, or a cache in front of it, can compress an answer
although it was asked not to. Its bytes pass unchanged; the meter reads a decoded copy, of which
nothing is kept."""

from __future__ import annotations

from collections.abc import Callable

from redbtc.meter.decoding import INPUT_STEP, Decoding, NotDecoded
from redbtc.meter.events import is_stream
from redbtc.meter.meters import Meter
from redbtc.meter.report import Report
from redbtc.steps import Steps

MAX_HELD_COMPRESSED = 64 << 10  # bytes that are held back although nothing is decoded from them


class DecodedMeter(Meter):
    """Meters a compressed answer with the meter that `choose` returns for a stream (True) or
    JSON."""

    at_once = 0

    def __init__(
        self,
        report: Report,
        codings: list[bytes],
        labelled: bool,
        choose: Callable[[bool], Meter],
        start: bytes = b"",
    ) -> None:
        """Prepare for an answer whose header names `codings`, and whose content type is that of a
        stream if it is `labelled`. `start` is its first bytes, if they were sent on already."""
        self.report = report
        self._choose = choose
        self._decoding: Decoding | None = Decoding(codings, start)  # None if it can't be decoded
        self._meter: Meter | None = None  # None until its type is known
        self._streams = False
        self._held = b""
        self._labelled = labelled

    def steps(self, chunk: bytes) -> Steps[bytes]:
        """Take the next bytes, in small steps; return what may be sent on now: all bytes but those
        with which the decoded answer ends."""
        passed: list[bytes] = []
        for at in range(0, len(chunk), INPUT_STEP):
            data = chunk[at : at + INPUT_STEP]
            grown = False
            if self._decoding and self.state != "ended":
                grown = yield from self._read(self._decoding, data)
            self._pass(data, grown, passed)
        return b"".join(passed)

    def _read(self, decoding: Decoding, data: bytes) -> Steps[bool]:
        """Decode and meter the bytes; return whether anything but white space was decoded."""
        grown = False
        try:
            for piece in decoding.decoded(data):
                grown = grown or bool(piece.strip())
                yield from self._meter_piece(piece)
                yield
        except NotDecoded:
            self._decoding = None
        return grown

    def _meter_piece(self, piece: bytes) -> Steps[None]:
        if self._meter is None:
            streams = is_stream(piece, self._labelled)
            if streams is None:
                return
            self._streams = streams
            self._meter = self._choose(streams)
            self._meter.report = self.report
        if self._meter.state != "ended":
            yield from self._meter.steps(piece)

    def _pass(self, data: bytes, grown: bool, passed: list[bytes]) -> None:
        """Hold back the bytes that may end the answer, and pass on the others. In a stream, these
        are the bytes from the event on that ends it; in JSON, the last bytes from which anything
        was decoded, and those that follow."""
        meter = self._meter
        if self._streams and meter:
            self.state = meter.state
            if meter.state == "open":
                passed.append(self._held + data)
                self._held = b""
                return
            self._held += data
            if len(self._held) > 2 * MAX_HELD_COMPRESSED:
                self.state = "ended"
            return
        if grown or self._decoding is None:
            passed.append(self._held)
            self._held = data
        else:
            self._held += data
            passed.append(self._held[:-MAX_HELD_COMPRESSED])
            self._held = self._held[-MAX_HELD_COMPRESSED:]

    def finish_steps(self) -> Steps[None]:
        if self._meter and self._decoding:
            yield from self._meter.finish_steps()
            if self._meter.state == "ended":
                self.state = "ended"
        else:
            yield from self.cut_off_steps()
            self.state = "ended"

    def cut_off_steps(self) -> Steps[None]:
        if self._meter:
            yield from self._meter.cut_off_steps()

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held
