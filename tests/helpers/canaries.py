"""Canaries: texts that stand for content, and the search for any part of them in what was written.

A canary is TAG and three random characters, six times in turn. So each 12 bytes of a canary contain
the whole TAG, and one search finds all parts of all canaries."""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Iterator
from pathlib import Path

TAG = "zQ7xJ"
TIMES = 6
MIN_PART = 12  # bytes of a canary that are found wherever they are
ALPHABET = string.ascii_letters + string.digits


def new_canary() -> str:
    return "".join(TAG + "".join(random.choices(ALPHABET, k=3)) for _ in range(TIMES))


def _in_base64() -> Iterator[bytes]:
    """Yield what the base64 of TAG has in common whatever is around it, for each place in a group
    of three bytes."""
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + TAG.encode() + b"\0\0")
        first, last = -(-offset * 8 // 6), (offset + len(TAG)) * 8 // 6
        yield encoded[first:last]


FORMS = [
    TAG.encode(),
    TAG.encode("utf-16-le"),
    TAG.encode().hex().encode(),
    TAG.encode().hex().upper().encode(),
    "".join(f"\\u{ord(each):04x}" for each in TAG).encode(),
    "".join(f"\\x{ord(each):02x}" for each in TAG).encode(),
    "".join(f"%{ord(each):02X}" for each in TAG).encode(),
    TAG.encode()[::-1],
    TAG.lower().encode(),
    TAG.upper().encode(),
    *_in_base64(),
]


def parts_in(data: bytes) -> list[bytes]:
    """Return what is around each part of a canary in the data, in any of FORMS."""
    return [data[max(0, at - 60) : at + 60] for form in FORMS if (at := data.find(form)) >= 0]


def files_with_parts(*folders: Path) -> dict[str, list[bytes]]:
    """Return the parts of canaries in each file of these folders that has any."""
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    found = {str(path): parts_in(path.read_bytes()) for path in files}
    return {path: parts for path, parts in found.items() if parts}
