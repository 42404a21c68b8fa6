"""WebSocket frames from clients: none can hold the loop, take unbounded memory or last forever."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import Opcode

from redbtc.gateway.websocket.client_sender import MAX_REFUSAL_PAUSE
from redbtc.server.frame_reader import MAX_PART
from tests.helpers.gateway import WITHOUT_COLLECTIONS, Gateway, MakeGateway, wait_until
from tests.helpers.speed import Stalls
from tests.helpers.upstream import Socket, Upstream, ws_events, ws_like_openai

pytestmark = pytest.mark.promise_9

MB = 1_000_000
MAX_BODY = 8 * MB  # so that an account may have 16 MB without a place
SERVER = f"[server]\nmax_body_bytes = {MAX_BODY}\n"
HELD_UNITS = 60  # of processor time: 42 ms on an ordinary machine
CREATE = {"type": "response.create", "model": "gpt-up", "input": "Hi", "stream": True}
HANDSHAKE = (
    "GET /v1/responses HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Authorization: Bearer "
)
SMALL_FRAMES = 6000  # of an account in a row


@pytest.fixture(autouse=True)
def speaking(upstream: Upstream) -> None:
    upstream.talk = ws_like_openai


class Wire:
    """A client that sends and receives single frames. Its mask is zero, so that payloads are sent
    as they are."""

    def __init__(self, gateway: Gateway, key: str) -> None:
        self.sock = socket.create_connection(("127.0.0.1", gateway.port), 60)
        self.sock.sendall(f"{HANDSHAKE}{key}\r\n\r\n".encode())
        self._read = b""
        head = self._until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head

    def _until(self, end: bytes) -> bytes:
        while end not in self._read:
            self._read += self.sock.recv(65536)
        found, _, self._read = self._read.partition(end)
        return found

    def _take(self, size: int) -> bytes:
        while len(self._read) < size:
            part = self.sock.recv(65536)
            if not part:
                raise ConnectionError
            self._read += part
        taken, self._read = self._read[:size], self._read[size:]
        return taken

    def send(self, data: bytes, opcode: Opcode = Opcode.TEXT, fin: bool = True) -> None:
        self.sock.sendall(frame(data, opcode, fin))

    def create(self, **fields: Any) -> None:
        self.send(json.dumps({**CREATE, **fields}).encode())

    def frame(self) -> tuple[int, bytes]:
        """Return the next frame's opcode and payload, skipping pings."""
        while True:
            first, size = self._take(2)
            if size >= 126:
                size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
            payload = self._take(size)
            if first & 15 != Opcode.PING:
                return first & 15, payload

    def event(self) -> dict[str, Any]:
        """Return the next event, skipping pongs."""
        while True:
            opcode, payload = self.frame()
            if opcode == Opcode.TEXT:
                event: dict[str, Any] = json.loads(payload)
                return event

    def until(self, *kinds: str) -> dict[str, Any]:
        while (event := self.event())["type"] not in kinds:
            pass
        return event

    def completed(self) -> None:
        event = self.until("response.completed", "error")
        assert event["type"] == "response.completed", event

    def refused(self) -> str:
        return str(self.until("error")["error"]["code"])

    def closed(self) -> int | None:
        """Return the close code of the connection, None if there is none."""
        with contextlib.suppress(ConnectionError):
            while True:
                opcode, payload = self.frame()
                if opcode == Opcode.CLOSE:
                    return int.from_bytes(payload[:2], "big")
        return None


@contextlib.contextmanager
def wire(gateway: Gateway, key: str) -> Iterator[Wire]:
    made = Wire(gateway, key)
    with made.sock:
        yield made


def frame(data: bytes, opcode: Opcode = Opcode.TEXT, fin: bool = True) -> bytes:
    size = len(data)
    first = bytes([opcode | (128 if fin else 0)])
    if size < 126:
        return first + bytes([128 | size]) + bytes(4) + data
    if size < 65536:
        return first + b"\xfe" + struct.pack("!H", size) + bytes(4) + data
    return first + b"\xff" + struct.pack("!Q", size) + bytes(4) + data


def message(size: int, **fields: Any) -> bytes:
    """Return a request of about `size` bytes."""
    return json.dumps({**CREATE, "input": "x" * size, **fields}).encode()


def fragmented(data: bytes, pieces: int) -> bytes:
    """Return a message cut into frames, some of them empty, with pings in between."""
    draw = random.Random(pieces)
    cuts = [0, *sorted(draw.randrange(len(data) + 1) for _ in range(pieces - 1)), len(data)]
    frames = []
    for number in range(pieces):
        opcode = Opcode.CONT if number else Opcode.TEXT
        frames.append(frame(data[cuts[number] : cuts[number + 1]], opcode, number == pieces - 1))
        if number % 100 == 0:
            frames.append(frame(b"ping", Opcode.PING))
    return b"".join(frames)


def test_a_message_passes_unchanged_however_it_is_cut(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    sent = []
    with wire(gateway, key) as ws:
        for size in (10, 70_000, MAX_PART - 10, 3 * MB):
            for pieces in (1, 2, 7, 1000):
                data = message(size, metadata={"pieces": str(pieces)})
                ws.sock.sendall(fragmented(data, pieces))
                ws.completed()
                sent.append(data)
        for byte in fragmented(message(10), 7):
            ws.sock.sendall(bytes([byte]))
            time.sleep(0.0002)
        ws.completed()
    assert upstream.sockets[0].texts == [*sent, message(10)]


def test_a_long_message_holds_the_loop_no_longer_than_a_short_one(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """It is unmasked and masked again in parts, whatever its frames are."""
    data = message(90 * MB)
    with wire(gateway, key) as ws, Stalls(gateway.port) as stalls:
        ws.send(data)
        ws.completed()
    assert upstream.sockets[0].texts == [data]
    assert stalls.longest < HELD_UNITS


def test_a_long_message_that_is_no_text_is_refused_in_slices(gateway: Gateway, key: str) -> None:
    data = message(90 * MB)[:-3] + b'\xff"}'
    with wire(gateway, key) as ws, Stalls(gateway.port) as stalls:
        ws.send(data)
        assert ws.refused() == "invalid_json"
        assert ws.closed() == 1007
    assert stalls.longest < HELD_UNITS


def test_a_control_frame_that_is_too_long_is_not_read(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    with wire(gateway, key) as ws:
        ws.sock.sendall(frame(b"x" * MB, Opcode.PING)[:20])
        assert ws.closed() == 1002


def test_a_handshake_with_a_long_url_is_refused_and_closed(gateway: Gateway) -> None:
    for size in (8_000, 9_000, 60_000):
        head = HANDSHAKE.replace("responses", f"responses?{'x' * size}")
        answer = gateway.raw(f"{head}none\r\n\r\n".encode(), until_close=True)
        assert answer.startswith(b"HTTP/1.1 431 "), size
    assert gateway.connections() == 0


def floods() -> dict[str, bytes]:
    begun = frame(b"{", fin=False)
    empty, short = frame(b"", Opcode.CONT, False), frame(b" ", Opcode.CONT, False)
    steer = {"type": "response.steer", "previous_response_id": "resp_x", "input": "x"}
    return {
        "empty continuations": begun + empty * 100_000,
        "continuations of a byte": begun + short * 20_000,
        "pings": frame(b"", Opcode.PING) * 100_000,
        "pongs": frame(b"x", Opcode.PONG) * 100_000,
        "an unknown type": frame(b'{"type":"x"}') * 20_000,
        "no JSON": frame(b"{") * 20_000,
        "empty messages": frame(b"") * 20_000,
        "steering of nothing": frame(json.dumps(steer).encode()) * 20_000,
    }


def test_no_flood_of_frames_holds_the_loop(gateway: Gateway, upstream: Upstream) -> None:
    """Reading an account that floods pauses, while another account's requests are served."""
    other = gateway.new_key("other")
    for name, flood in floods().items():
        longest, grown = flooded(gateway, gateway.new_key(name), other, flood)
        assert longest < HELD_UNITS, name
        assert grown < 20 * MB, name
    assert not [text for each in upstream.sockets for text in each.texts if b'"gpt-up"' not in text]


def flooded(gateway: Gateway, key: str, other: str, flood: bytes) -> tuple[float, int]:
    """Flood two connections of one key while another key is used. Return the longest stall in
    units, and the bytes by which the gateway has grown."""
    before = gateway.rss()
    with wire(gateway, key) as ws, wire(gateway, key) as second, wire(gateway, other) as calm:
        stop = threading.Event()

        def send(to: Wire) -> None:
            with contextlib.suppress(OSError):
                to.sock.sendall(flood)

        def read(of: Wire) -> None:
            with contextlib.suppress(OSError, ConnectionError):
                while not stop.is_set() and of.sock.recv(65536):
                    pass

        threads = [
            threading.Thread(target=work, args=(each,))
            for each in (ws, second)
            for work in (send, read)
        ]
        with Stalls(gateway.port) as stalls:
            for thread in threads:
                thread.start()
            for _ in range(10):
                calm.create()
                calm.completed()
            time.sleep(0.2)
        grown = gateway.rss() - before
        stop.set()
        for each in (ws, second):
            with contextlib.suppress(OSError):
                each.sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(60)
    return stalls.longest, grown


def test_an_account_that_floods_waits_and_is_served_again(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    pings = frame(b"", Opcode.PING) * (SMALL_FRAMES - 100)
    with wire(gateway, key) as ws:
        ws.sock.sendall(pings)
        ws.create()
        ws.completed()
        started = time.monotonic()
        ws.sock.sendall(frame(b"", Opcode.PING) * 300)
        ws.create()
        ws.completed()
        assert time.monotonic() - started > 0.5, "it has waited"


def test_requests_that_are_refused_in_their_turn_are_refused_slowly(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """They are not small, and they were read before they were refused."""
    with wire(gateway, key) as ws:
        started = time.monotonic()
        for _ in range(SMALL_FRAMES // 10 + 10):
            ws.create(background=True, metadata={"long": "x" * 1024})
            assert ws.refused() == "invalid_request"
        assert time.monotonic() - started > 0.5, "it has waited"


def test_a_message_has_a_bounded_number_of_fragments(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    piece = frame(b"x" * 1024, Opcode.CONT, False)
    with wire(gateway, key) as ws:
        ws.send(b'{"', fin=False)
        with contextlib.suppress(OSError):
            ws.sock.sendall(piece * 10_001)
        assert ws.refused() == "request_too_large"
        assert ws.closed() == 1009
    assert not upstream.sockets[0].texts


def ended(ws: Wire) -> bool:
    """Return whether the gateway has ended its side of the connection, which is not reset."""
    return ws.sock.recv(1) == b""


def test_a_message_that_is_too_large_is_refused_and_never_reset(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The client sends all of it before it reads anything."""
    gateway = make_gateway("[server]\nmax_body_bytes = 2000000").start()
    key = gateway.new_key()
    room = 2 * MB - len(message(0))
    tries = [
        frame(message(room + 1)),
        frame(message(9 * MB)),
        fragmented(message(room + 1), 100),
        fragmented(message(9 * MB), 100),
    ] * 4
    for data in tries:
        with wire(gateway, key) as ws:
            ws.sock.sendall(data)
            event = ws.until("error")
            assert (event["status"], event["error"]["code"]) == (413, "request_too_large")
            assert "at most 2000000 bytes" in event["error"]["message"]
            assert ws.closed() == 1009
            assert ended(ws)
    refused = 'redbtc_requests_total{outcome="refused",route="/v1/responses",status="413"}'
    assert gateway.metrics()[refused] == len(tries)
    with wire(gateway, key) as ws:
        for data in (frame(message(room)), fragmented(message(room), 100)):
            ws.sock.sendall(data)
            ws.completed()


def test_a_refused_client_may_send_the_rest_of_its_message_before_the_end(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """nginx resets the client's connection at an earlier end of the upstream's side."""
    gateway = make_gateway("[server]\nmax_body_bytes = 2000000").start()
    with wire(gateway, gateway.new_key()) as ws:
        ws.sock.sendall(frame(message(9 * MB))[:MB])
        assert ws.refused() == "request_too_large"
        assert ws.closed() == 1009
        for _ in range(50):
            ws.sock.sendall(bytes(1000))
            assert not select.select([ws.sock], [], [], 0.01)[0]
        assert ended(ws)


def test_who_does_not_stop_sending_is_cut_off(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("[server]\nmax_body_bytes = 2000000").start()
    with wire(gateway, gateway.new_key()) as ws:
        ws.sock.sendall(frame(message(2 * MB)))
        with contextlib.suppress(OSError):
            while True:
                ws.sock.sendall(bytes(MB))
        wait_until(lambda: gateway.connections() == 0)


def test_a_connection_ends_at_once_after_a_frame_that_is_none(gateway: Gateway, key: str) -> None:
    with wire(gateway, key) as ws:
        ws.sock.sendall(b"\xff" * 9 * MB)
        assert ws.closed() == 1002
        assert ended(ws)
        assert gateway.connections() == 1, "only the client's side is left"


def test_new_limits_hold_for_open_connections(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("[server]\nmax_body_bytes = 200000\nmax_reading_bytes = 800000").start()
    key = gateway.new_key()

    def reload(settings: str) -> None:
        before = gateway.log().count('"event":"reloaded"')
        gateway.configure(f"[server]\n{settings}\n")
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: gateway.log().count('"event":"reloaded"') > before)

    with wire(gateway, key) as ws, wire(gateway, key) as slow:
        for each in (ws, slow):
            each.send(message(150_000))
            each.completed()
        reload("max_body_bytes = 8000000")
        ws.send(message(7 * MB))
        ws.completed()
        reload("max_body_bytes = 100000\nbody_timeout_seconds = 0.2")
        ws.send(message(150_000))
        assert ws.refused() == "request_too_large"
        slow.send(b"{", fin=False)
        assert slow.refused() == "request_timeout"


def unfinished(ws: Wire, size: int) -> None:
    """Send all of a message but its last byte, as far as the gateway reads it."""
    ws.sock.setblocking(False)
    data, quiet = memoryview(frame(message(size)))[:-1], 0
    while data and quiet < 40:
        quiet += 1
        with contextlib.suppress(BlockingIOError):
            data, quiet = data[ws.sock.send(data) :], 0
        time.sleep(0.005)
    ws.sock.settimeout(60)


def test_unfinished_messages_take_bounded_memory_and_stop_nobody_else(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(f"{SERVER}[limits]\nqueue_seconds = 0.5").start()
    hog, other = gateway.new_key("hog"), gateway.new_key("other")
    before = gateway.rss()
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(wire(gateway, hog)) for _ in range(10)]
        for ws in wires:
            unfinished(ws, MAX_BODY - 1000)
        with wire(gateway, other) as ws:
            ws.send(message(MAX_BODY - 1000))
            ws.completed()
        assert gateway.rss() - before < 60 * MB
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 0, 60)
        wires[0].create(stream_id="short")  # part of the long one, which is not ended
        refused = 0
        for ws in wires[2:]:
            event = ws.until("error")
            assert (event["status"], event["error"]["code"]) == (429, "concurrency_limit_exceeded")
            assert event["headers"]["retry-after"] == "1"
            refused += 1
        assert refused == 8
    with wire(gateway, hog) as ws:  # all of the memory is free again
        wait_until(lambda: gateway.get("/status").is_success)
        ws.send(message(MAX_BODY - 1000))
        ws.completed()


def test_a_message_that_is_refused_is_thrown_away_and_the_connection_stays(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(f"{SERVER}[limits]\nqueue_seconds = 0.3").start()
    key = gateway.new_key()
    with wire(gateway, key) as one, wire(gateway, key) as two, wire(gateway, key) as ws:
        unfinished(one, MAX_BODY - 1000)
        unfinished(two, MAX_BODY - 1000)
        for data in (frame(message(MB)), fragmented(message(MB), 9)):
            ws.sock.sendall(data)
            assert ws.refused() == "concurrency_limit_exceeded"
            ws.create()
            ws.completed()
        one.send(b"")  # the rest of its message: nothing but the end of one that is no JSON
    with wire(gateway, key) as ws:
        for _ in range(3):
            ws.send(message(MAX_BODY - 1000))
            ws.completed()


def test_waiting_requests_take_memory_until_they_have_a_place(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(f"{SERVER}[limits]\nqueue_seconds = 0.5").start()
    key = gateway.new_key(concurrency=1)
    release = threading.Event()

    async def talk(sock: Socket) -> None:
        while True:
            request = await sock.recv()
            while not release.is_set():
                await asyncio.sleep(0.01)
            await sock.send(*ws_events(len(sock.frames), request))

    upstream.talk = talk
    before = gateway.rss()
    with wire(gateway, key) as ws:
        for _ in range(12):  # of one lane: only the first has a place, seven have memory
            ws.send(message(2 * MB + 10_000))
        for _ in range(4):
            event = ws.until("error")
            assert "large request bodies" in event["error"]["message"]
        assert gateway.rss() - before < 60 * MB
        release.set()
        for _ in range(8):
            ws.completed()
        ws.send(message(MAX_BODY - 1000))
        ws.completed()


def test_the_ids_of_waiting_requests_take_memory_as_well(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """What is read of a frame with many short ids is many times larger than the frame."""
    gateway = make_gateway(f"{SERVER}[limits]\nqueue_seconds = 100").start()
    release = threading.Event()

    async def talk(sock: Socket) -> None:
        while True:
            request = await sock.recv()
            while not release.is_set():
                await asyncio.sleep(0.01)
            await sock.send(*ws_events(len(sock.frames), request))

    upstream.talk = talk
    items = [{"id": f"{number:x}"} for number in range(20_000)]
    with wire(gateway, gateway.new_key(concurrency=1)) as ws:
        for given in ([], items):  # the first is in flight, and what one leaves behind is measured
            ws.create(input=given)
        before = gateway.rss()
        for _ in range(40):
            ws.create(input=items)
        ws.send(b'{"type":"last"}')
        refused = []
        while "'last'" not in (event := ws.until("error"))["error"]["message"]:
            refused.append(event["error"]["code"])
        assert refused == ["concurrency_limit_exceeded"] * 38, "16 MB hold three, one is there"
        assert gateway.rss() - before < 40 * MB
        release.set()
        ws.completed()
        for _ in range(3):
            assert ws.refused() == "invalid_request"  # the items are nobody's
        for size in (MAX_BODY - 1000,) * 3:  # all of the memory is free again
            ws.send(message(size))
            ws.completed()


def test_the_ids_of_a_request_need_no_turn_behind_a_long_message(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Their memory is in use already: while some is free, a message that waits for more than that
    lets nobody else be refused."""
    gateway = make_gateway(f"{SERVER}[limits]\nqueue_seconds = 100").start()
    key = gateway.new_key()
    items = [{"id": f"{number}", "type": "function_call", "name": "x"} for number in range(400)]
    with contextlib.ExitStack() as stack:
        ws, *wires = [stack.enter_context(wire(gateway, key)) for _ in range(4)]
        for each in wires:  # of 16 MB these take 14, and the third waits
            unfinished(each, 7 * MB)
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
        ws.create(input=items)
        ws.completed()
        with gateway.client(key) as client:
            body = {"model": "gpt-up", "input": items}
            assert client.post("/responses", json=body).status_code == 200
        assert gateway.metrics()["redbtc_queued"] == 1


def test_a_message_has_its_time(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("[server]\nbody_timeout_seconds = 0.4").start()
    key = gateway.new_key()
    begun = [
        frame(message(100))[:1],
        frame(message(100))[:-1],
        frame(message(200_000))[:-1],
        frame(b"{", fin=False),
        frame(b"{", fin=False) + frame(b"", Opcode.PING),
    ]
    with wire(gateway, key) as idle:
        for data in begun:
            with wire(gateway, key) as ws:
                ws.create()
                ws.completed()
                ws.sock.sendall(data)
                assert ws.refused() == "request_timeout"
                assert ws.closed() == 1008
                assert ended(ws)
                wait_until(lambda: gateway.connections() == 2, 20, "for the client to end its side")
        with wire(gateway, key) as ws, contextlib.suppress(OSError):
            ws.send(b"{", fin=False)
            for _ in range(100):  # pings are no progress
                ws.send(b"", Opcode.PING)
                time.sleep(0.01)
            assert ws.refused() == "request_timeout"
        idle.create()
        idle.completed()


class PingsOften(Gateway):
    """Start a gateway that sends pings after 0.2 seconds, and waits a second for their answers."""

    prelude = """
import uvicorn
init, often = uvicorn.Config.__init__, {"ws_ping_interval": 0.2, "ws_ping_timeout": 1}
uvicorn.Config.__init__ = lambda self, *given, **named: init(self, *given, **{**named, **often})
"""


@pytest.mark.process
def test_who_sends_a_long_frame_or_is_not_read_need_not_answer_pings(
    tmp_path: Path, upstream: Upstream
) -> None:
    """The answer comes behind the frame."""
    gateway = PingsOften(tmp_path, upstream.url, f"{SERVER}[limits]\nqueue_seconds = 100")
    gateway.start()
    data = frame(message(MAX_BODY - 1000))
    with contextlib.ExitStack() as stack:
        stack.callback(gateway.close)
        key = gateway.new_key()
        dead, waits, *slow = (stack.enter_context(wire(gateway, key)) for _ in range(4))
        for ws in slow:  # these take all memory
            ws.sock.sendall(data[:-30])
        waiting = threading.Thread(target=waits.sock.sendall, args=(data,))
        waiting.start()
        for at in range(-30, -1):
            for ws in slow:
                ws.sock.sendall(data[at : at + 1])
            time.sleep(0.1)
        assert gateway.metrics()["redbtc_queued"] == 1
        assert dead.closed() == 1011
        for ws in slow:
            ws.sock.sendall(data[-1:])
            ws.completed()
        waits.completed()
        waiting.join()


def test_who_is_over_the_rate_is_refused_before_the_frame_is_read(
    gateway: Gateway, upstream: Upstream
) -> None:
    key = gateway.new_key(requests_per_minute=1)
    hostile = {"type": "mcp_approval_response", "approve": True, "approval_request_id": "x"}
    with wire(gateway, key) as ws:
        ws.create()
        ws.completed()
        with Stalls(gateway.port) as stalls:
            for _ in range(5):
                ws.create(input=[hostile] * 12_000, stream_id="a")
                assert ws.refused() == "rate_limit_exceeded"
        assert stalls.longest < HELD_UNITS
        ws.send(b'{"stream_id":"b","input":')
        event = ws.until("error")
        assert event["error"]["code"] == "rate_limit_exceeded"
        ws.create(stream_id="c")
        assert ws.until("error")["stream_id"] == "c"


@pytest.mark.parametrize("size", [300, 3 * MB])
def test_a_name_that_is_too_long_is_not_shown(gateway: Gateway, key: str, size: int) -> None:
    """A very long one is cut out of the frame and replaced before it is read."""
    steer = {"type": "response.steer", "previous_response_id": "x" * size, "input": "x"}
    with wire(gateway, key) as ws:
        for given, name in (
            ({"type": "x" * size}, "type"),
            ({**CREATE, "stream_id": "x" * size}, "stream_id"),
            ({**CREATE, "model": "x" * size}, "model"),
            (steer, "previous_response_id"),
            ({**CREATE, "previous_response_id": "x" * size}, "previous_response_id"),
        ):
            ws.send(json.dumps(given).encode())
            error = ws.until("error")["error"]
            assert error["message"] == f"'{name}' has more than 256 characters."
            assert error["param"] == name
        ws.send(b"{}")
        assert ws.until("error")["error"]["message"] == "'type' is missing."


def test_text_that_is_none_ends_the_connection(gateway: Gateway, key: str) -> None:
    with wire(gateway, key) as ws:
        ws.send(b'{"type":"\xff"}')
        assert ws.refused() == "invalid_json"
        assert ws.closed() == 1007


def test_at_most_four_steerings_of_a_response_are_unanswered(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    release = threading.Event()

    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        for _ in range(4):
            await sock.recv()
        while not release.is_set():
            await asyncio.sleep(0.01)
        await sock.send({"type": "response.steer.failed"})
        await sock.recv()
        await sock.send(ws_events(1, {"model": "gpt-up"})[-1])

    upstream.talk = talk
    steer = {"type": "response.steer", "previous_response_id": "resp_ws_1", "input": "more"}
    with wire(gateway, key) as ws:
        ws.create()
        ws.until("response.output_text.delta")
        for _ in range(5):
            ws.send(json.dumps(steer).encode())
        event = ws.until("error")
        assert event["error"]["code"] == "concurrency_limit_exceeded"
        assert "4 unanswered steering events" in event["error"]["message"]
        release.set()
        ws.until("response.steer.failed")
        ws.send(json.dumps(steer).encode())
        ws.completed()
    assert len(upstream.sockets[0].texts) == 6


def test_the_ids_in_all_steerings_of_a_response_are_bounded(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """They are kept until the response ends, even if the upstream refuses the steering."""

    async def talk(sock: Socket) -> None:
        request = await sock.recv()
        await sock.send(*ws_events(1, request)[:2])
        for _ in range(2):
            await sock.recv()
            await sock.send({"type": "response.steer.failed"})
        await sock.send(ws_events(1, request)[-1])

    def steer(first: int, size: int) -> None:
        items = [{"id": f"{first + n}", "role": "user", "content": "x"} for n in range(size)]
        event = {"type": "response.steer", "previous_response_id": "resp_ws_1", "input": items}
        ws.send(json.dumps(event).encode())

    upstream.talk = talk
    with wire(gateway, key) as ws:
        ws.create(input=[{"id": "mine", "role": "user", "content": "x"}])
        ws.until("response.output_text.delta")
        steer(0, 12_000)
        ws.until("response.steer.failed")
        steer(12_000, 8_000)
        error = ws.until("error")["error"]
        assert error["message"] == "The input of this response has more than 20000 items with ids."
        assert error["param"] == "input"
        steer(12_000, 7_999)
        ws.completed()


@pytest.fixture
def unanswered(make_gateway: MakeGateway, upstream: Upstream) -> Iterator[Gateway]:
    """A gateway without garbage collections, whose upstream answers no message until the end."""
    gateway, release = make_gateway("[limits]\nqueue_seconds = 100"), threading.Event()
    gateway.prelude = WITHOUT_COLLECTIONS

    async def talk(sock: Socket) -> None:
        request = await sock.recv()
        while not release.is_set():
            await asyncio.sleep(0.01)
        await sock.send(*ws_events(1, request))

    upstream.talk = talk
    yield gateway.start()
    release.set()


def fill(wires: Sequence[Wire]) -> None:
    """Send more messages, each in a lane of its own, than the account may have waiting."""
    for number in range(900):
        for ws in wires:
            ws.create(stream_id=f"{number}", metadata={"long": "x" * 1024})


def test_only_so_many_lanes_of_an_account_wait(unanswered: Gateway) -> None:
    """It is a bound for all of its connections."""
    hog = unanswered.new_key("hog")
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(wire(unanswered, hog)) for _ in range(4)]
        fill(wires)
        for ws in wires[1:]:
            assert ws.refused() == "concurrency_limit_exceeded"
        assert unanswered.metrics()["redbtc_queued"] == 1000


def test_many_lanes_leave_without_holding_the_loop(unanswered: Gateway) -> None:
    """It takes 5 to 8 units, and 75 to 105 if all are told to leave at once."""
    with contextlib.ExitStack() as stack:
        keys = [unanswered.new_key(f"hog-{number}") for number in range(4)]
        wires = [stack.enter_context(wire(unanswered, key)) for key in keys]
        fill(wires)
        wait_until(lambda: unanswered.metrics()["redbtc_queued"] > 3500)
        with Stalls(unanswered.port) as stalls:
            for ws in wires:
                ws.sock.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: unanswered.metrics()["redbtc_queued"] == 0)
    assert stalls.longest < 40


def test_handshakes_have_a_rate(gateway: Gateway, key: str) -> None:
    """Each one connects to an upstream; one that is refused does not."""

    def status(key: str) -> bytes:
        with gateway.connect() as sock:
            sock.sendall(f"{HANDSHAKE}{key}\r\n\r\n".encode())
            return sock.recv(12)[9:]

    assert status(key) == b"101"
    with wire(gateway, key) as flood:
        for _ in range(SMALL_FRAMES):
            flood.send(b"", Opcode.PONG)
        wait_until(lambda: status(key) == b"429")
    assert status(gateway.new_key("other")) == b"101"


def test_the_gateway_stops_while_a_client_that_has_closed_does_not_read(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, {**delta, "delta": "x" * 20 * MB}, completed)
        await sock.recv()

    upstream.talk = talk
    with wire(gateway, key) as ws:
        ws.create()
        ws.until("response.created")
        assert ws.sock.recv(1)  # of the long event, which the gateway can't send on
        ws.send(struct.pack("!H", 1000), Opcode.CLOSE)
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)  # it has seen that
        assert gateway.terminate() == 0


def test_what_follows_a_close_frame_is_not_read(gateway: Gateway, key: str) -> None:
    """A frame that is too long for its kind would be refused."""
    with wire(gateway, key) as ws:
        ws.send(b"x", Opcode.BINARY)
        assert ws.closed() == 1003
        ws.sock.sendall(frame(struct.pack("!H", 1000), Opcode.CLOSE) + b"\x89\xff" * 10)
        wait_until(lambda: gateway.connections() == 0)
    with wire(gateway, key) as ws:
        ws.sock.sendall(frame(struct.pack("!H", 1000), Opcode.CLOSE) + b"\x89\xff" * 10)
        assert ws.closed() == 1000
    wait_until(lambda: gateway.connections() == 0)
    assert '"status":500' not in gateway.log()


def test_requests_that_are_refused_together_do_not_shut_their_account_out(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """They wait for a place, in lanes of their own. Reading goes on before a ping's time is up."""

    async def talk(sock: Socket) -> None:
        await sock.recv()
        await sock.stop_reading()

    upstream.talk = talk
    limits = "[limits]\nqueue_seconds = 2\n[limits.account]\nconcurrency = 1"
    gateway = make_gateway(limits).start()
    key = gateway.new_key()
    with wire(gateway, key) as ws, wire(gateway, key) as second:
        for number in range(490):  # not small
            for each in (ws, second):
                each.create(stream_id=str(number), metadata={"long": "x" * 1024})
        for each in (ws, second):
            for _ in range(489):
                assert each.refused() == "concurrency_limit_exceeded"
        answer = gateway.raw(f"{HANDSHAKE}{key}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 429 "), answer
        wait = re.search(rb"\r\nretry-after: (\d+)", answer)
        assert wait
        assert int(wait[1]) <= MAX_REFUSAL_PAUSE + 1
