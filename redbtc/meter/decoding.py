"""Decode compressed answers, in bounded pieces: a small answer that decodes to a very large one
takes time in small steps, and no memory. The first bytes tell how an answer is compressed; if they
don't, its header does."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from redbtc.headers import Headers
from redbtc.meter.events import BLANK

MAX_CODINGS = 3  # of one answer
START_SIZE = 8  # bytes that tell how an answer is compressed
INPUT_STEP = 4 << 10  # compressed bytes in one step
OUTPUT_STEP = 32 << 10  # decoded bytes in one step
MAX_DECODED = 1 << 30  # bytes; no real answer is as large
ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}  # 8 MB, RFC 9659


class NotDecoded(Exception):
    """The bytes can't be decoded: they are not what the header says, or too many."""


class Gzip:
    """A decoder of gzip (RFC 1952): a series of members. Bytes after the last one are ignored."""

    magic = b"\x1f\x8b"

    def __init__(self) -> None:
        self._decoder: Any = None
        self._over = False

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes; yield the result in pieces. Raises NotDecoded."""
        piece = b""
        try:
            while (data or len(piece) == OUTPUT_STEP) and not self._over:
                self._decoder = self._decoder or self._begin(data)
                piece = self._decoder.decompress(data, OUTPUT_STEP)
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
    """A decoder of deflate, which is zlib's format (RFC 9110 §8.4.1.2). Some servers send the
    compressed bytes without it."""

    def _begin(self, data: bytes) -> Any:
        return zlib.decompressobj(15 if data[0] & 0x8F == 0x08 else -15)

    def _ends_before(self, data: bytes) -> bool:
        return True


class Zstd:
    """A decoder of zstd (RFC 8878): a series of frames."""

    def __init__(self) -> None:
        self._decoder = zstd.ZstdDecompressor(options=ZSTD_OPTIONS)

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes; yield the result in pieces. Raises NotDecoded."""
        try:
            while data or not self._decoder.needs_input:
                yield self._decoder.decompress(data, OUTPUT_STEP)
                data = b""
                if self._decoder.eof:
                    data = self._decoder.unused_data
                    self._decoder = zstd.ZstdDecompressor(options=ZSTD_OPTIONS)
        except zstd.ZstdError:
            raise NotDecoded from None


class Brotli:
    """A decoder of Brotli (RFC 7932). Bytes after the stream are ignored."""

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes; yield the result in pieces. Raises NotDecoded."""
        if self._decoder.is_finished():
            return
        try:
            yield (piece := self._decoder.process(data, output_buffer_limit=OUTPUT_STEP))
            while piece or not self._decoder.can_accept_more_data():  # it can hold output back
                yield (piece := self._decoder.process(b"", output_buffer_limit=OUTPUT_STEP))
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
    """Stands for the decoder of an unknown coding."""

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Raise NotDecoded for any bytes."""
        raise NotDecoded
        yield b""


def codings_of(headers: Headers) -> list[bytes]:
    """Return the codings of an answer, in the order in which they were applied (RFC 9110 §8.4)."""
    values = [value for name, value in headers if name.lower() == b"content-encoding"]
    codings = [each.strip().lower() for each in b",".join(values).split(b",")]
    return [each for each in codings if each not in (b"", b"identity")]


# How JSON and server-sent events begin, and no compressed answer does.
NOT_COMPRESSED = re.compile(
    rb'[%b]*+(?:\Z|\{[ \t\r\n]*+(?:\Z|["}])|(?:data|event|id|retry)?:)' % re.escape(BLANK)
)
CODING_MAGIC = {  # RFC 1952, RFC 8878, RFC 1950: how the bytes of a coding begin
    b"gzip": re.compile(rb"\x1f\x8b\x08"),
    b"zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    b"deflate": re.compile(rb"\x78[\x01\x5e\x9c\xda]"),
}


def codings_in(start: bytes, named: list[bytes]) -> list[bytes]:
    """Return the codings of an answer that begins with `start`; `named` are those that its header
    names. Upstreams name things that are no codings (utf-8, aws-chunked) or that they have undone,
    and leave out codings that they have applied."""
    if NOT_COMPRESSED.match(start):
        return []
    known = [each for each in named if each in DECODERS]
    for coding, magic in CODING_MAGIC.items():
        if magic.match(start):
            is_named = bool(known) and DECODERS[known[-1]] is DECODERS[coding]
            return known if is_named else [coding]
    return named


class Decoding:
    """Decodes an answer that is compressed once, several times, or not at all. `codings` are those
    that its header names."""

    def __init__(self, codings: list[bytes], start: bytes = b"") -> None:
        """Prepare for an answer of which the bytes in `start`, fewer than START_SIZE, have
        arrived."""
        self._codings = codings
        self._start = start
        self._decoders: list[Any] | None = None  # None until START_SIZE bytes have come
        self._size = 0

    def decoded(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes; yield the result in pieces. Raises NotDecoded."""
        if self._decoders is None:
            data = self._start + data
            if len(data) < START_SIZE:
                self._start = data
                return
            self._decoders = self._decoders_for(data)
        for at in range(0, len(data), INPUT_STEP):
            for piece in self._through(self._decoders, data[at : at + INPUT_STEP]):
                self._size += len(piece)
                if self._size > MAX_DECODED:
                    raise NotDecoded
                yield piece

    def rest(self) -> bytes:
        """Return an answer that is too short to be compressed, once it has come whole."""
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
