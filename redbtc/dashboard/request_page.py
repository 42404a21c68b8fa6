"""The page of one request, and of its bodies if they are stored. To open the page reads no body:
that takes one of its forms, since each reading is in the log of changes."""

from __future__ import annotations

import codecs
from typing import NamedTuple

from starlette.responses import Response

from redbtc.admin.api import API
from redbtc.admin.http import bytes_response
from redbtc.admin.outputs_log import BodyContent
from redbtc.dashboard.account_pages import account_base
from redbtc.dashboard.page_request import PageRequest
from redbtc.dashboard.rendering import PageVariables
from redbtc.dashboard.screens import Actions
from redbtc.dashboard.usage_pages import download
from redbtc.errors import NotFound
from redbtc.meter.decoding import Decoding, NotDecoded
from redbtc.slices import with_turns

MAX_SHOWN_BYTES = 1 << 20  # of a body; all of it can be downloaded
TEXT_PART = 16 << 10  # characters that are escaped at once
CODING_SUFFIXES = {"gzip": ".gz", "zstd": ".zst"}


class ShownBody(NamedTuple):
    """A body on the page: its text in parts, None if it is no text. Not all of it is shown if
    `more`."""

    name: str
    parts: list[str] | None
    more: bool


async def request_page(page: PageRequest) -> PageVariables:
    """Show a request, and whether its bodies are stored."""
    base = await account_base(page, "Usage")
    found = await page.ask(API.show_request, request=page.path["request"])
    if found.request.account != base["account"].name:
        raise NotFound("this account has no such request")
    return {
        **base,
        "found": found,
        "row": found.request,
        "may_read": page.actor.rank == "owner",
        "shown": None,
    }


async def show_body(page: PageRequest) -> PageVariables:
    """Read a stored body and show it."""
    stored = await read_selected(page)
    return {"shown": await shown_body(page.form.get("body", ""), stored)}


async def download_body(page: PageRequest) -> Response:
    """Read a stored body and return it as a file, exactly as it was sent."""
    stored, name = await read_selected(page), page.form.get("body", "")
    file = f"{page.path['request']}-{name}{CODING_SUFFIXES.get(stored.encoding, '')}"
    return await bytes_response(stored.content, download(file))


async def read_selected(page: PageRequest) -> BodyContent:
    """Return the stored body that a form selects. Raises UserError."""
    request, body = page.path["request"], page.form.get("body", "")
    return await page.ask(API.read_stored_body, request=request, body=body)


async def shown_body(name: str, stored: BodyContent) -> ShownBody:
    """Return a body as the page shows it: decoded, and no more than its beginning."""
    text, more = bytearray(), False
    codings = stored.encoding.encode("latin-1").split(b", ") if stored.encoding else []
    decoding = Decoding(codings)
    try:
        async for piece in with_turns(decoding.decoded(stored.content)):
            text += piece
            more = len(text) > MAX_SHOWN_BYTES
            if more:
                del text[MAX_SHOWN_BYTES:]
                break
        else:
            text += decoding.rest()
        decoder = codecs.getincrementaldecoder("utf-8")()
        characters = decoder.decode(bytes(text))  # the last character can be cut off
    except (NotDecoded, UnicodeDecodeError):
        return ShownBody(name, None, more=False)
    if "\0" in characters:
        return ShownBody(name, None, more=False)
    starts = range(0, len(characters), TEXT_PART)
    return ShownBody(name, [characters[at : at + TEXT_PART] for at in starts], more)


REQUEST_ACTIONS: Actions = {"show": show_body, "download": download_body}
