"""Read compressed answers. An upstream, or a cache in front of it, can compress an answer although
it was asked not to. Its bytes pass unchanged; the meter reads a decoded copy, of which nothing is
kept. Decoders return bounded pieces, so that a small answer that decodes to very much takes time in
small steps, and no memory. The first bytes tell how an answer is compressed; where they do not, its
header does."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from redbtc.headers import Headers
from redbtc.meter.events import BLANK, is_stream
from redbtc.meter.meters import Meter
from redbtc.meter.report import Report

MAX_CODINGS = 3  # in a row
START = 8  # bytes by which it is told how an answer is compressed
INPUT = 4 << 10  # compressed bytes in one step
OUTPUT = 32 << 10  # decoded bytes in one step
MAX_DECODED = 1 << 30  # bytes; no answer is as large
MAX_HELD = 64 << 10  # compressed bytes that wait although nothing is decoded from them
ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}  # 8 MB, RFC 9659


class NotDecoded(Exception):
    """The bytes are not what the header says."""


class Gzip:
    """RFC 1952: members in a row. What follows the last one is ignored."""

    magic = b"\x1f\x8b"

    def __init__(self) -> None:
        self._decoder: Any = None
        self._over = False

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Yield what the bytes decode to, in pieces. Raises NotDecoded."""
        piece = b""
        try:
            while (data or len(piece) == OUTPUT) and not self._over:
                self._decoder = self._decoder or self._begin(data)
                piece = self._decoder.decompress(data, OUTPUT)
                data = self._decoder.unconsumed_tail
                yield piece
                if self._decoder.eof:
                    data, piece, self._decoder = self._decoder.unused_data, b"", None
                    self._over = self._ends_before(data)
        except zlib.error:
            raise NotDecoded from None

    def _begin(self, data: bytes) -> Any:
        return zlib.decompressobj(31)

    def _ends_before(self, data: bytes) -> bool:
        return data[:2] != self.magic[: len(data)]


class Deflate(Gzip):
    """RFC 9110 §8.4.1.2: zlib's format. Some servers send the compressed bytes without it."""

    def _begin(self, data: bytes) -> Any:
        return zlib.decompressobj(15 if data[0] & 0x8F == 0x08 else -15)

    def _ends_before(self, data: bytes) -> bool:
        return True


class Zstd:
    """RFC 8878: frames in a row."""

    def __init__(self) -> None:
        self._decoder = zstd.ZstdDecompressor(options=ZSTD_OPTIONS)

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """As of Gzip."""
        try:
            while data or not self._decoder.needs_input:
                yield self._decoder.decompress(data, OUTPUT)
                data = b""
                if self._decoder.eof:
                    data = self._decoder.unused_data
                    self._decoder = zstd.ZstdDecompressor(options=ZSTD_OPTIONS)
        except zstd.ZstdError:
            raise NotDecoded from None


class Brotli:
    """RFC 7932. What follows the stream is ignored."""

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """As of Gzip."""
        if self._decoder.is_finished():
            return
        try:
            yield (piece := self._decoder.process(data, output_buffer_limit=OUTPUT))
            while piece or not self._decoder.can_accept_more_data():  # it can hold output back
                yield (piece := self._decoder.process(b"", output_buffer_limit=OUTPUT))
        except brotli.error:
            raise NotDecoded from None


Decoder = Gzip | Zstd | Brotli
DECODERS: dict[bytes, Callable[[], Decoder]] = {
    b"gzip": Gzip,
    b"x-gzip": Gzip,
    b"deflate": Deflate,
    b"zstd": Zstd,
    b"br": Brotli,
}


class Unreadable:
    """Stands for a coding that is not known here."""

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Raises NotDecoded."""
        raise NotDecoded
        yield b""


def codings_of(headers: Headers) -> list[bytes]:
    """Return the codings of an answer, in the order in which they were applied (RFC 9110 §8.4)."""
    values = [value for name, value in headers if name.lower() == b"content-encoding"]
    codings = [each.strip().lower() for each in b",".join(values).split(b",")]
    return [each for each in codings if each not in (b"", b"identity")]


# How JSON and server-sent events begin, and nothing that is compressed.
PLAIN = re.compile(
    rb'[%b]*+(?:\Z|\{[ \t\r\n]*+(?:\Z|["}])|(?:data|event|id|retry)?:)' % re.escape(BLANK)
)
MAGIC = {  # RFC 1952, RFC 8878, RFC 1950: how the bytes of a coding begin
    b"gzip": re.compile(rb"\x1f\x8b\x08"),
    b"zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    b"deflate": re.compile(rb"\x78[\x01\x5e\x9c\xda]"),
}


def codings_in(start: bytes, named: list[bytes]) -> list[bytes]:
    """Return the codings of an answer that begins so. Upstreams name codings that are none (utf-8,
    aws-chunked) or that they have undone, and leave out those that they have applied."""
    if PLAIN.match(start):
        return []
    known = [each for each in named if each in DECODERS]
    for coding, magic in MAGIC.items():
        if magic.match(start):
            told = bool(known) and DECODERS[known[-1]] is DECODERS[coding]
            return known if told else [coding]
    return named


class Decoding:
    """Decodes an answer that is compressed, once or several times, or not at all. `codings` are
    those that its header names."""

    def __init__(self, codings: list[bytes], start: bytes = b"") -> None:
        """`start`: bytes that have arrived already, fewer than START."""
        self._codings = codings
        self._start = start
        self._decoders: list[Any] | None = None  # until enough has come to tell
        self._size = 0

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Yield what the bytes decode to, in pieces. Raises NotDecoded."""
        if self._decoders is None:
            data = self._start + data
            if len(data) < START:
                self._start = data
                return
            self._decoders = self._decoders_for(data)
        for at in range(0, len(data), INPUT):
            for piece in self._through(self._decoders, data[at : at + INPUT]):
                self._size += len(piece)
                if self._size > MAX_DECODED:
                    raise NotDecoded
                yield piece

    def rest(self) -> bytes:
        """Return an answer that is too short to be compressed, once all of it has come."""
        return self._start if self._decoders is None else b""

    def _decoders_for(self, start: bytes) -> list[Any]:
        codings = codings_in(start, self._codings)
        if len(codings) > MAX_CODINGS or any(each not in DECODERS for each in codings):
            return [Unreadable()]
        return [DECODERS[each]() for each in reversed(codings)]

    def _through(self, decoders: list[Any], data: bytes) -> Iterator[bytes]:
        if not decoders:
            yield data
            return
        for piece in decoders[0].decoded(data):
            if piece:
                yield from self._through(decoders[1:], piece)
            else:
                yield b""


class DecodedMeter(Meter):
    """Meters a compressed answer. `choose` returns the meter for a stream, or for JSON."""

    at_once = 0

    def __init__(
        self,
        report: Report,
        codings: list[bytes],
        labelled: bool,
        choose: Callable[[bool], Meter],
        start: bytes = b"",
    ) -> None:
        """`labelled`: its content type is that of a stream. `start`: its first bytes, if they have
        been sent on already."""
        self.report = report
        self.ended = False
        self._choose = choose
        self._decoding: Decoding | None = Decoding(codings, start)  # None: it can't be decoded
        self._meter: Meter | None = None  # until it is known what the answer is
        self._streams = False
        self._held = b""
        self._labelled = labelled

    @property
    def ending(self) -> bool:  # type: ignore[override]
        return self._meter is not None and self._meter.ending and not self.ended

    def steps(self, chunk: bytes) -> Generator[None, None, bytes]:
        """Take the next bytes, in small steps; return what may be sent on now: all but the bytes
        with which the decoded answer ends."""
        passed: list[bytes] = []
        for at in range(0, len(chunk), INPUT):
            data = chunk[at : at + INPUT]
            grown = False
            if self._decoding and not self.ended:
                grown = yield from self._read(self._decoding, data)
            self._pass(data, grown, passed)
        return b"".join(passed)

    def _read(self, decoding: Decoding, data: bytes) -> Generator[None, None, bool]:
        """Decode and meter; return whether anything but space was decoded."""
        grown = False
        try:
            for piece in decoding.decoded(data):
                grown = grown or bool(piece.strip())
                yield from self._meter_piece(piece)
                yield
        except NotDecoded:
            self._decoding = None
        return grown

    def _meter_piece(self, piece: bytes) -> Generator[None, None, None]:
        if self._meter is None:
            streams = is_stream(piece, self._labelled)
            if streams is None:
                return
            self._streams = streams
            self._meter = self._choose(streams)
            self._meter.report = self.report
        if not self._meter.ended:
            yield from self._meter.steps(piece)

    def _pass(self, data: bytes, grown: bool, passed: list[bytes]) -> None:
        """Hold what the answer may end with: in a stream from the event on that ends it; else the
        last bytes from which anything was decoded, and those that follow."""
        meter = self._meter
        if self._streams and meter:
            if meter.ending or meter.ended:
                self._held += data
                self.ended = meter.ended or len(self._held) > 2 * MAX_HELD
            else:
                passed.append(self._held + data)
                self._held = b""
            return
        if grown or self._decoding is None:
            passed.append(self._held)
            self._held = data
        else:
            self._held += data
            passed.append(self._held[:-MAX_HELD])
            self._held = self._held[-MAX_HELD:]

    def finishing(self) -> Generator[None, None, None]:
        if self._meter and self._decoding:
            yield from self._meter.finishing()
            self.ended = self.ended or self._meter.ended
        else:
            yield from self.tearing()
            self.ended = True

    def tearing(self) -> Generator[None, None, None]:
        if self._meter:
            yield from self._meter.tearing()

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held
