"""Read the body of a request within its limits.

The whole body is read into memory, once, bounded in size and time, after the memory for it has been
reserved (Reservation). What must be known of it is read by redbtc/request_body.
"""

from __future__ import annotations

from redbtc.config import Settings
from redbtc.deadlines import Deadline
from redbtc.gateway.endpoints import Endpoint
from redbtc.headers import Headers, header
from redbtc.limits.memory import FREE_BYTES, Reservation
from redbtc.refusals import ClientLeft, Refusal
from redbtc.request_body.body import RequestBody
from redbtc.request_body.contents import BodyRules
from redbtc.request_body.forms import Form
from redbtc.request_body.media import decompressed, max_decoded, media_of
from redbtc.request_body.pieces import Buffer
from redbtc.server.asgi import Receive
from redbtc.slices import in_slices
from redbtc.steps import Steps


async def read_content(
    headers: Headers,
    receive: Receive,
    deadline: Deadline,
    settings: Settings,
    reserved: Reservation,
    endpoint: Endpoint,
) -> RequestBody:
    """Return the request's body, with what must be known of it. Raises Refusal, ClientLeft."""
    media = media_of(headers, endpoint.forms)
    form = Form(media.boundary) if media.boundary else None
    plain_form = None if media.encoding else form
    sent = await read_body(headers, receive, deadline, settings, reserved, plain_form)
    if deadline.client_left:
        raise ClientLeft
    if media.encoding:
        max_bytes = max_decoded(len(sent), settings.server.max_body_bytes)
        await reserved.take(max_bytes, deadline)
        steps = _decoded(sent, media.encoding, max_bytes, reserved, form, endpoint.body)
    else:
        steps = RequestBody.read_body(sent, sent, form, endpoint.body)
    body = await in_slices(steps, reserved.account_id)
    if body.excess_bytes:
        await reserved.take(body.excess_bytes, None)
    reserved.body = b""
    return body


def _decoded(
    body: Buffer,
    encoding: str,
    max_bytes: int,
    reserved: Reservation,
    form: Form | None,
    rules: BodyRules,
) -> Steps[RequestBody]:
    """Decode a body and read it, as one job: otherwise the decoded copies of many requests would be
    in memory while they wait for their turns. Raises Refusal."""
    text = yield from decompressed(body, encoding, max_bytes)
    reserved.give_back(max_bytes - len(text))
    if form:
        yield from form.grow(text)
    return (yield from RequestBody.read_body(body, text, form, rules))


async def read_body(
    headers: Headers,
    receive: Receive,
    deadline: Deadline,
    settings: Settings,
    reserved: Reservation,
    form: Form | None = None,
) -> Buffer:
    """Return the request's body. If `form` is given, it parses the body as it arrives. Memory is
    reserved first; for a body of unknown length the reservation doubles as the body grows. Raises
    Refusal if the body is too large or too slow, or no memory comes free; ClientLeft."""
    max_bytes, seconds = settings.server.max_body_bytes, settings.server.body_timeout_seconds
    length = header(headers, b"content-length")
    more = int(length) if length else min(FREE_BYTES, max_bytes)
    _check_size(more, max_bytes)
    body: Buffer = b""
    room = 0
    while True:
        await reserved.take(more, deadline)
        room += more
        begun = bool(body)
        try:
            with deadline.running(seconds):
                body, whole = await _read_up_to(
                    room, reserved, receive, max_bytes, form is not None
                )
        except TimeoutError:
            if deadline.client_left:
                raise ClientLeft from None
            raise Refusal("request_timeout") from None
        seconds = deadline.expires_at - deadline.now()
        if form:  # no deadline runs while it waits to be parsed: the client is not slow
            await in_slices(form.grow(body), reserved.account_id, begun)
        if whole:
            return body
        more = min(room, max_bytes - room) if len(body) > room else 0


async def _read_up_to(
    room: int, reserved: Reservation, receive: Receive, max_bytes: int, one: bool
) -> tuple[Buffer, bool]:
    """Read until the body is whole or fills the reserved `room` in bytes; if `one`, only what comes
    first. Return what has been read so far, which is also kept in `reserved.body`, and whether it
    is whole. Raises Refusal, ClientLeft."""
    body = reserved.body
    while len(body) <= room:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        if isinstance(body, bytearray):
            body += message["body"]
        else:
            body = bytearray(body + message["body"]) if body else message["body"]
            reserved.body = body
        _check_size(len(body), max_bytes)
        if one or not message["more_body"]:
            return body, not message["more_body"]
    return body, False


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise Refusal("request_too_large", f"The request body is larger than {max_bytes} bytes.")
