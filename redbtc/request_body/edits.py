"""The one edit that is ever made to a body: `stream_options.include_usage` is added to a chat."""

from __future__ import annotations

import contextlib

import msgspec

from redbtc.refusals import Refusal
from redbtc.request_body.facts import StreamOptions
from redbtc.request_body.pieces import Buffer, Pieces
from redbtc.request_body.strict_json import (
    OBJECT_END,
    Members,
    check_letters,
    end_of,
    read_members,
    start_of,
)
from redbtc.steps import Steps

MAX_OPTIONS = 4096  # bytes of `stream_options` in which a null is searched for
Options = StreamOptions | msgspec.UnsetType | None


def place_to_edit(
    text: Buffer, pieces: Pieces, members: Members, options: StreamOptions | None
) -> Steps[int | None]:
    """Return the offset in a body of the value to edit, so that `include_usage` is added:
    `stream_options`, or the null in it. None if the body decides it itself. Raises Refusal for
    options that could be read in more than one way."""
    if options:
        (part,) = pieces.parts(members["stream_options"])
        check_letters(read_members(part), {"include_usage"})
        if options.decides:
            return None
    at = yield from _place_of(pieces, "stream_options")
    if options and options.include_usage is None:
        at += yield from _place_in_options(text, at)
    return at


def include_usage_edit(sent: Buffer, options: Options, at: int) -> tuple[int, int, bytes] | None:
    """Return the edit that adds `include_usage`: the start and the end of the bytes to replace, and
    the new bytes. None if the body decides it itself. `at` is the offset from `place_to_edit`."""
    if options is None:
        return at, at + len(b"null"), b'{"include_usage":true}'
    if isinstance(options, msgspec.UnsetType):
        at = sent.index(b"{") + 1
        return at, at, b'"stream_options":{"include_usage":true},'
    if options.decides:
        return None
    if options.include_usage is None:
        return at, at + len(b"null"), b"true"
    at = sent.index(b"{", at) + 1
    return at, at, b'"include_usage":true' + (b"" if OBJECT_END.match(sent, at) else b",")


def _place_in_options(text: Buffer, at: int) -> Steps[int]:
    """Return the offset of the value of `include_usage` in `stream_options`, which begin at `at` in
    the body's text. Raises Refusal if they are longer than any sensible ones."""
    options = bytes(text[at : at + MAX_OPTIONS])
    options = options[: (yield from end_of(options, 0))]
    with contextlib.suppress(Refusal):
        return start_of(options, read_members(options), "include_usage")
    message = f"'stream_options' has more than {MAX_OPTIONS} bytes."
    raise Refusal("invalid_request", message, param="stream_options")


def _place_of(pieces: Pieces, wanted: str) -> Steps[int]:
    """Return the offset in a body of the value of its member `wanted`."""
    for number, part in enumerate(pieces.parts(pieces.root)):
        members = read_members(part)
        if wanted in members:
            return pieces.place(number, start_of(part, members, wanted))
        yield
    raise KeyError(wanted)
