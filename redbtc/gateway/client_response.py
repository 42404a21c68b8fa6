"""The response that the client gets to a request that is forwarded."""

from __future__ import annotations

import re
from typing import Literal

from redbtc.headers import Headers, header
from redbtc.meter.decoding import codings_of
from redbtc.server.asgi import Message, Send
from redbtc.server.framing import NO_BODY
from redbtc.upstream.headers import REQUEST_ID, headers_for_client, without
from redbtc.upstream.response import UpstreamResponse

INERT_TYPE = re.compile(rb"(?i)(?:application/json|text/event-stream)\s*(?:;[^,]*)?")
# Headers that describe the upstream's body.
OF_BODY = (
    *(b"content-type", b"content-length", b"content-encoding", b"content-language"),
    *(b"content-md5", b"digest", b"content-digest", b"repr-digest", b"etag", b"accept-ranges"),
)
# With these a browser neither runs a response of any other type nor takes it for HTML.
INERT: Headers = [(b"content-security-policy", b"sandbox"), (b"x-content-type-options", b"nosniff")]


Sent = Literal[  # the part of the response that the client has been sent
    "nothing",  # it can still be told of a failure
    "head",  # and perhaps a part of the body: it can only be cut off
]


class ClientResponse:
    """The response to a client. The head is kept until the first bytes of the body are sent, since
    these can show that the answer is something else than the upstream's headers say."""

    __slots__ = (
        "_head",
        "_send",
        "codings",
        "content_type",
        "is_labelled_stream",
        "sent",
        "waits_for_client",
    )

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message = {}
        self.sent: Sent = "nothing"
        self.waits_for_client = False  # for the client to read what it was sent
        self.content_type = b""  # the upstream's, in lower case
        self.is_labelled_stream = False  # by the content type
        self.codings: list[bytes] = []  # with which it is labelled as compressed

    def set_head(self, answer: UpstreamResponse, id_of_request: str, more: Headers) -> bytes | None:
        """Make the head from the upstream's answer. `more` are headers of the gateway's own. Return
        the upstream's own id of the request, None if it has not said one."""
        headers = headers_for_client(answer.headers)
        content_type = b", ".join([value for name, value in headers if name == b"content-type"])
        self.content_type = content_type.lower()
        self.is_labelled_stream = self.content_type.startswith(b"text/event-stream")
        self.is_labelled_stream &= answer.status not in NO_BODY
        if header(headers, b"content-encoding") is not None:
            self.codings = codings_of(headers)
        # A stream may end earlier than the upstream's Content-Length says. Status 204 must not have
        # one (RFC 9110 §8.6), but some upstreams send it.
        if self.is_labelled_stream or answer.status == 204:
            headers = without_length(headers)
        if not INERT_TYPE.fullmatch(content_type):
            # A browser looks only at the first of several X-Content-Type-Options.
            headers = [line for line in headers if line[0] != b"x-content-type-options"] + INERT
        request_id = id_of_request.encode()
        upstream_request_id = header(headers, REQUEST_ID)
        if upstream_request_id is None:
            headers.append((REQUEST_ID, request_id))
        headers.append((b"x-redbtc-request-id", request_id))
        headers += more
        self._head = {"type": "http.response.start", "status": answer.status, "headers": headers}
        return upstream_request_id

    @property
    def has_length(self) -> bool:
        """Return whether the head tells the length of the body."""
        return header(self._head["headers"], b"content-length") is not None

    def drop_length(self) -> None:
        """Let the head tell no length: the answer has turned out to be a stream."""
        self._head["headers"] = without_length(self._head["headers"])

    def replace_header(self, name: bytes, value: bytes | None) -> None:
        """Replace a header of the upstream's by the gateway's own value; None removes it."""
        headers = without(self._head["headers"], frozenset([name]))
        self._head["headers"] = headers if value is None else [*headers, (name, value)]

    def set_json(self, length: int) -> None:
        """Replace the headers that describe the upstream's body by those of JSON of this length."""
        self.is_labelled_stream = False
        headers = [line for line in self._head["headers"] if line[0] not in OF_BODY]
        json_headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
        self._head["headers"] = headers + json_headers

    def grow_length(self, more: int) -> None:
        """Add `more` to the content length in the head, if it has one. The head must not have been
        sent."""
        length = header(self._head["headers"], b"content-length")
        if length is not None:
            headers = without_length(self._head["headers"])
            self._head["headers"] = [*headers, (b"content-length", b"%d" % (int(length) + more))]

    async def send_head(self) -> None:
        """Send the head, if that has not been done."""
        if self.sent == "nothing":
            self.sent = "head"
            await self._send(self._head)

    async def send(self, body: bytes) -> None:
        """Send a part of the body, after the head. Returns when the client reads fast enough."""
        self.waits_for_client = True
        if self.sent == "nothing":
            await self.send_head()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self.waits_for_client = False

    async def send_after_end(self, body: bytes) -> None:
        """Send bytes that waited for the row, or came after the stream's end. A client that is slow
        to read these has nothing to wait for."""
        await self.send_head()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes) -> None:
        """Send the last part of the body."""
        await self.send_head()
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def without_length(headers: Headers) -> Headers:
    """Return the headers without Content-Length."""
    return [line for line in headers if line[0] != b"content-length"]
