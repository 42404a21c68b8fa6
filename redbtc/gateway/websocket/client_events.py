"""The events that the client of a session sends: response.create, and response.steer for a response
of the same connection. Everything else is refused."""

from __future__ import annotations

import contextlib

import msgspec
from websockets.exceptions import ConnectionClosed

from redbtc.gateway.gateway import Gateway
from redbtc.gateway.references import required_location
from redbtc.gateway.websocket.client_sender import ClientSender
from redbtc.gateway.websocket.lanes import Lanes, MessageMemory
from redbtc.gateway.websocket.turn_response import SessionObjects
from redbtc.gateway.websocket.turn_runner import TurnRunner
from redbtc.limits.admission import Admission
from redbtc.limits.memory import FREE_BYTES, Reservation
from redbtc.refusals import Refusal, not_found, refusal_of
from redbtc.request_body.body import ClientEvent
from redbtc.request_body.pieces import Buffer, check_utf8
from redbtc.server.asgi import ClientRequest, Receive
from redbtc.server.websocket_protocol import INVALID_DATA, REFUSED, UNSUPPORTED_DATA
from redbtc.slices import in_slices


class ClientEvents:
    """Reads the events of a session's client and acts on them."""

    def __init__(
        self,
        gateway: Gateway,
        handshake: ClientRequest,
        receive: Receive,
        reservation: Reservation,
        sender: ClientSender,
        lanes: Lanes,
        runner: TurnRunner,
        objects: SessionObjects,
    ) -> None:
        """`reservation` is the memory of messages that are read, and of requests that wait."""
        self._gateway = gateway
        self._handshake = handshake
        self._receive = receive
        self._reservation = reservation
        self._sender = sender
        self._lanes = lanes
        self._runner = runner
        self._objects = objects

    async def read(self) -> None:
        """Read until the client is gone."""
        while (message := await self._receive())["type"] != "websocket.disconnect":
            if message["type"] == REFUSED:
                request, refusal = self._handshake.new_request(), message["refusal"]
                await self._sender.refuse(request, refusal, None, message["close"])
                continue
            with MessageMemory(self._reservation, message["reserved"]) as memory:
                if "text" in message:
                    await self._take(message["text"], memory)
                else:
                    await self._sender.close(UNSUPPORTED_DATA, "Only text messages are supported.")
            message = {}  # keep no text until the next one comes

    async def _take(self, text: Buffer, memory: MessageMemory) -> None:
        """Act on a message, or refuse it. Its memory is kept if it waits for a place."""
        event: ClientEvent | None = None
        account_id = self._reservation.account_id
        try:
            key = self._gateway.authenticate(self._handshake)
            with self._gateway.limiter.charge(key, self._gateway.settings.limits) as admission:
                event = await in_slices(ClientEvent.read_event(text), account_id)
                if event.excess_bytes:
                    await memory.grow(event.excess_bytes)
                await self._act(event, admission, memory)
        except (Refusal, MemoryError) as error:
            refusal, close = refusal_of(error), None
            if refusal.code == "invalid_json" and not await is_utf8(text, account_id):
                close = INVALID_DATA
            stream_id = event.facts.stream_id if event else stream_id_in(text)
            await self._sender.refuse(self._handshake.new_request(), refusal, stream_id, close)
        except ConnectionClosed:
            pass  # the upstream's, which ends the turn

    async def _act(self, event: ClientEvent, admission: Admission, memory: MessageMemory) -> None:
        """Queue a request, or steer a response. Raises Refusal, ConnectionClosed."""
        kind = event.facts.type
        if kind == "response.steer":
            await self._steer(event, admission)
        elif kind == "response.create":
            event.check_model(usual="")
            self._runner.serve(event, admission, memory)
        else:
            message = "'type' is missing."
            if kind is not None:
                message = f"'{kind}' is not a supported event type."
            raise Refusal("invalid_request", message, param="type")

    async def _steer(self, event: ClientEvent, admission: Admission) -> None:
        """Add input to a response that is in flight on this connection. Raises Refusal,
        ConnectionClosed."""
        if not self._gateway.admits:
            raise Refusal("draining")
        event.check_steering()
        response_id = event.facts.previous_response_id or ""
        if event.offers_tools:
            raise Refusal("invalid_request", "'response.steer' can't add tools.", param="input")
        turn = self._lanes.turn_of_response(response_id)
        if turn is None:
            raise not_found("previous_response_id", response_id)
        key = self._gateway.authenticate(self._handshake)
        made = self._objects.locations
        await required_location(self._gateway, self._handshake, key, event, made)
        await turn.steer(response_id, event, admission)
        if recorder := turn.response.recorder:
            await recorder.take_client_event(event)
        if turn.socket and not turn.socket.is_lost:
            await turn.socket.send_in_time(event.sent)


class Addressed(msgspec.Struct):
    """The only member of an event that is needed to refuse the event."""

    stream_id: str | None = None


ADDRESSED = msgspec.json.Decoder(Addressed)


def stream_id_in(text: Buffer) -> str | None:
    """Return the lane of an event that can't be read, to name it in the refusal. It is not looked
    for in a long event."""
    if len(text) <= FREE_BYTES:
        with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return ADDRESSED.decode(text).stream_id
    return None


async def is_utf8(text: Buffer, account_id: str) -> bool:
    """Return whether a text is valid UTF-8."""
    try:
        await in_slices(check_utf8(text), account_id)
    except Refusal:
        return False
    return True
