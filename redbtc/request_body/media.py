"""Media types and content encodings of request bodies."""

from __future__ import annotations

import functools
import re
import sys
import zlib
from typing import Any, NamedTuple

from redbtc.steps import Steps

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from redbtc.headers import Headers, header
from redbtc.meter.decoding import ZSTD_OPTIONS
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer

# Exactly RFC 9110 §8.3.1: what two readers could read in different ways is refused, here and in the
# heads of a form's parts.
PAIR = rb';\s*+([\w-]++|filename\*)=("[^"]*+"|[^\s;"]*+)'
PARAMETRIZED = re.compile(rb"\s*+([\w/+.-]++)((?:\s*+" + PAIR + rb")*+)\s*+;?\s*+", re.IGNORECASE)
PARAMETER = re.compile(PAIR, re.IGNORECASE)
JSON_TYPE = re.compile(rb"application/(?:[\w.+-]+\+)?json")
BOUNDARY = re.compile(rb"[\w'()+,./:=?-]{1,70}")  # RFC 2046 §5.1.1, without its inner spaces
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
MAX_RATIO = 32  # of decoded to compressed bytes; parsing needs a multiple of the decoded bytes
MIN_DECODED = 64 << 10  # decoded bytes that are allowed at any ratio
MAX_FRAMES = 100  # gzip members or zstd frames of one body
DECODER_INPUT, DECODER_OUTPUT = 32 << 10, 256 << 10  # bytes in each step, which takes under 1 ms


class Media(NamedTuple):
    """The encoding of a body ("gzip", "zstd" or ""), and the boundary of a form; None for JSON."""

    encoding: str
    boundary: bytes | None


def media_of(headers: Headers, forms: bool) -> Media:
    """Return the media type and encoding that the headers give. Raises Refusal for those that are
    not supported, before the body is read."""
    encoding, content_type = header(headers, b"content-encoding"), header(headers, b"content-type")
    return _media_of(encoding or b"identity", content_type or b"application/json", forms)


@functools.lru_cache(maxsize=64)  # most requests have the same headers
def _media_of(content_encoding: bytes, content_type: bytes, forms: bool) -> Media:
    encoding = content_encoding.strip().lower().decode("latin-1")
    encoding = {"identity": "", "x-gzip": "gzip"}.get(encoding, encoding)
    if encoding not in ("", "gzip", "zstd"):
        message = "Content-Encoding must be gzip or zstd, or absent."
        raise Refusal("unsupported_media_type", message)
    kind, parameters = parametrized(content_type) or (b"", {})
    if parameters.get(b"charset", b"utf-8").lower() in CHARSETS:
        if JSON_TYPE.fullmatch(kind):
            return Media(encoding, None)
        boundary = parameters.get(b"boundary", b"")
        if forms and kind == b"multipart/form-data" and BOUNDARY.fullmatch(boundary):
            return Media(encoding, boundary)
    allowed = "application/json or multipart/form-data" if forms else "application/json"
    raise Refusal("unsupported_media_type", f"Content-Type must be {allowed}, with charset UTF-8.")


def parametrized(text: bytes) -> tuple[bytes, dict[bytes, bytes]] | None:
    """Return a header's value and its parameters, whose names are in lower case. None if it can't
    be read, or could be read in more than one way."""
    match = PARAMETRIZED.fullmatch(text)
    if match is None or b'\\"' in text:
        return None
    found = [(name.lower(), value.strip(b'"')) for name, value in PARAMETER.findall(match[2])]
    parameters = dict(found)
    return (match[1].lower(), parameters) if len(parameters) == len(found) else None


def max_decoded(size: int, maximum: int) -> int:
    """Return how many bytes the decoded copy of a body of `size` bytes may have, `maximum` at
    most."""
    return min(maximum, max(MIN_DECODED, MAX_RATIO * size))


def decompressed(body: Buffer, encoding: str, maximum: int) -> Steps[Buffer]:
    """Decode a compressed body in small steps and return the copy. Raises Refusal if that is longer
    than `max_decoded` allows, or the body can't be decoded."""
    maximum = max_decoded(len(body), maximum)
    decoded, at = bytearray(), 0
    for _ in range(MAX_FRAMES):
        decoder: Any = zlib.decompressobj(31)
        if encoding == "zstd":
            decoder = zstd.ZstdDecompressor(options=ZSTD_OPTIONS)
        rest: Buffer = b""  # input that zlib returns unused; zstd keeps it
        while not decoder.eof:
            given, before = rest, len(decoded)
            if not rest and getattr(decoder, "needs_input", True):
                given = body[at : at + DECODER_INPUT]
                at += len(given)
            try:
                decoded += decoder.decompress(given, min(DECODER_OUTPUT, maximum + 1 - before))
            except (zlib.error, zstd.ZstdError):
                raise unreadable(encoding) from None
            if len(decoded) > maximum:
                message = f"The decompressed request body is larger than {maximum} bytes."
                raise Refusal("request_too_large", message)
            if not given and len(decoded) == before:  # the compressed data is cut short
                raise unreadable(encoding)
            rest = getattr(decoder, "unconsumed_tail", b"")
            yield
        at -= len(decoder.unused_data)
        if at == len(body):
            return decoded
    raise unreadable(encoding)


def unreadable(encoding: str) -> Refusal:
    """Return the refusal of a body that is not what its Content-Encoding says."""
    return Refusal("invalid_request", f"The request body is not valid {encoding}.")
