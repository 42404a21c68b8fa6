"""Estimate the output tokens of a picture by the quality and size that its event or item
reports."""

from __future__ import annotations

import base64
import contextlib
import re
from typing import Any

QUALITIES = {"low": 272, "medium": 1056, "high": 4160}  # tokens of 1024x1024 pixels
PIXELS = 1024 * 1024
MAX_PIXELS = 3840 * 2160
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc2]..\x08(..)(..)", re.DOTALL)


def picture_tokens(quality: Any, size: Any, head: Any) -> int:
    """Return the output tokens of a picture. `head` is the beginning of its base64. An unknown
    quality counts as high, an unknown size as 1024x1024."""
    match = SIZE.fullmatch(size) if isinstance(size, str) else None
    pixels = int(match[1]) * int(match[2]) if match else pixels_in(head)
    for_square = QUALITIES.get(quality if isinstance(quality, str) else "", QUALITIES["high"])
    return round(for_square * min(pixels or PIXELS, MAX_PIXELS) / PIXELS)


def pixels_in(head: Any) -> int:
    """Return the number of pixels that the head of a PNG, WebP or JPEG file gives; 0 if unknown.
    `head` is the beginning of its base64."""
    data = b""
    if isinstance(head, str):
        with contextlib.suppress(ValueError):
            data = base64.b64decode(head[: min(len(head), 512) // 4 * 4])
    if data.startswith(b"\x89PNG") and len(data) >= 24:
        return number(data[16:20]) * number(data[20:24])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return webp_pixels(data)
    match = JPEG_SIZE.search(data) if data.startswith(b"\xff\xd8") else None
    return number(match[1]) * number(match[2]) if match else 0


def number(data: bytes) -> int:
    """Return a big-endian number."""
    return int.from_bytes(data, "big")


def webp_pixels(data: bytes) -> int:
    """Return the number of pixels of a WebP file (RFC 9649 §2.5 to §2.7)."""
    kind = data[12:16]
    if kind == b"VP8X":
        sides = data[24:27], data[27:30]
        return (int.from_bytes(sides[0], "little") + 1) * (int.from_bytes(sides[1], "little") + 1)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    sides = data[26:28], data[28:30]
    return (int.from_bytes(sides[0], "little") & 0x3FFF) * (
        int.from_bytes(sides[1], "little") & 0x3FFF
    )
