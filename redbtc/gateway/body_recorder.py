"""Hand the bodies of a logged request to the request log (redbtc/store/request_log/), as the
client has sent and was sent them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from redbtc.deadlines import Deadline
from redbtc.gateway.gateway import Gateway
from redbtc.headers import Headers
from redbtc.meter.decoding import codings_of
from redbtc.request_body.body import RequestBody
from redbtc.server.asgi import Client, Message, Send
from redbtc.slices import in_slices
from redbtc.steps import Steps
from redbtc.store.keys import Key, log_days_of
from redbtc.store.request_log import REQUEST, RESPONSE, Recording
from redbtc.telemetry import log, shown_error

COPIED_BYTES = 256 << 10  # in one step, which takes about 0.1 ms

MAX_ENCODING = 100  # characters


class BodyRecorder:
    """Hands the bodies of one request to the log. A failure of the log ends the recording, and
    nothing else: the request goes on."""

    def __init__(self, recording: Recording, account_id: str, request_id: str) -> None:
        self._recording: Recording | None = recording
        self._account_id = account_id
        self._request_id = request_id

    @classmethod
    def begin(cls, gateway: Gateway, key: Key, request_id: str) -> BodyRecorder | None:
        """Return a recorder for a request whose row has begun; None if its bodies are not kept. The
        setting is read again, since it may have been switched off while the request waited: what an
        owner has erased must not come back."""
        try:
            days = log_days_of(gateway.store, key.id)
            if days is None:
                return None
            recording = gateway.request_log.recording(key._replace(log_days=days), request_id)
        except Exception as error:  # whatever it is, it is not the request's business
            log_failure(request_id, error)
            return None
        return cls(recording, key.account_id, request_id) if recording else None

    async def take_body(self, body: RequestBody, headers: Headers) -> None:
        """Record a request's body. `headers` are those of the request. A long body is copied in
        slices, since `body` can change."""
        self._note_encoding(REQUEST, headers)
        await in_slices(self._copy(body.as_client_sent()), self._account_id, started=True)

    async def take_client_event(self, body: RequestBody) -> None:
        """Record an event that the client has sent over a WebSocket, on a line of its own."""
        await in_slices(self._copy(body.as_client_sent()), self._account_id, started=True)
        self._hand(Recording.request, b"\n")

    async def take_event(self, message: str | bytes) -> None:
        """Record an event that the client was sent over a WebSocket, on a line of its own."""
        await in_slices(self._copy_event(message), self._account_id, started=True)

    def recorded(self, send: Send, client: Client, deadline: Deadline) -> Send:
        """Return a `send` that records the response's body as far as the client is sent it. Events
        that pass the request's task by (Client.send_now) are recorded as well."""
        send_now = client.send_now

        def recorded_send_now(data: bytes) -> bool:
            sent = send_now(data)
            if sent:
                self._hand(Recording.response, data)
            return sent

        async def recorded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._note_encoding(RESPONSE, message["headers"])
            await send(message)
            if message["type"] == "http.response.body" and not deadline.client_left:
                self._hand(Recording.response, message["body"])

        client.send_now = recorded_send_now
        return recorded_send

    def end(self, *, has_row: bool) -> None:
        """Record nothing more, and store nothing of a request whose row was removed."""
        recording, self._recording = self._recording, None
        if recording:
            self._end(recording, has_row=has_row)

    def _end(self, recording: Recording, *, has_row: bool) -> None:
        try:
            if has_row:
                recording.end()
            else:
                recording.discard()
        except Exception as error:
            log_failure(self._request_id, error)

    def _note_encoding(self, body: int, headers: Headers) -> None:
        if self._recording:
            encoding = b", ".join(codings_of(headers)).decode("latin-1")
            self._recording.encodings[body] = encoding[:MAX_ENCODING]

    def _copy(self, parts: list[bytes | memoryview]) -> Steps[None]:
        for part in parts:
            if isinstance(part, bytes):  # which does not change
                self._hand(Recording.request, part)
                continue
            for start in range(0, len(part), COPIED_BYTES):
                self._hand(Recording.request, part[start : start + COPIED_BYTES])
                yield

    def _copy_event(self, message: str | bytes) -> Steps[None]:
        for start in range(0, len(message), COPIED_BYTES):
            self._hand(Recording.response, message[start : start + COPIED_BYTES])
            yield
        self._hand(Recording.response, b"\n")

    def _hand(
        self, method: Callable[[Recording, bytes], None], part: bytes | memoryview | str
    ) -> None:
        if self._recording is None or not part:
            return
        try:
            method(self._recording, part.encode() if isinstance(part, str) else bytes(part))
        except Exception as error:  # whatever it is, it is not the request's business
            recording, self._recording = self._recording, None
            recording.is_short = True  # what is stored of it is not complete
            log_failure(self._request_id, error)
            self._end(recording, has_row=True)


def log_failure(request_id: str, error: Exception) -> None:
    """Log why a request is not recorded. The error's message could hold content."""
    log(logging.ERROR, "request_log", request_id=request_id, **shown_error(error))
