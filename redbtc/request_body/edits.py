"""Find the place where stream_options.include_usage is added to a body."""

from __future__ import annotations

import contextlib
import re

from redbtc.refusals import Refusal
from redbtc.request_body.pieces import TEXT, Buffer, Pieces, Steps
from redbtc.request_body.strict_json import read_members, start_of

MAX_OPTIONS = 4096  # bytes of `stream_options` in which a null is looked for
BRACKETS = re.compile(rb"[\[{]|[\]}]|" + TEXT, re.DOTALL)


def end_of(text: Buffer, start: int) -> Steps[int]:
    """Return the end of the object or list that begins at `start`."""
    depth = 0
    for number, match in enumerate(BRACKETS.finditer(text, start)):
        first = text[match.start()]
        if first != 0x22:
            depth += 1 if first in b"[{" else -1
            if not depth:
                return match.end()
        if number % 1024 == 0:
            yield
    return len(text)


def place_in_options(text: Buffer, at: int) -> Steps[int]:
    """Return the offset of the value of `include_usage` in `stream_options`, which begin at `at` in
    the body's text. Raises Refusal if they are longer than any that are of use."""
    options = bytes(text[at : at + MAX_OPTIONS])
    options = options[: (yield from end_of(options, 0))]
    with contextlib.suppress(Refusal):
        return start_of(options, read_members(options), "include_usage")
    message = f"'stream_options' has more than {MAX_OPTIONS} bytes."
    raise Refusal("invalid_request", message, param="stream_options")


def place_of(pieces: Pieces, wanted: str) -> Steps[int]:
    """Return the offset in a body of the value of its member `wanted`."""
    for number, part in enumerate(pieces.parts(pieces.root)):
        members = read_members(part)
        if wanted in members:
            return pieces.place(number, start_of(part, members, wanted))
        yield
    raise KeyError(wanted)
