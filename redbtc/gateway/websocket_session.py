"""/v1/responses as OpenAI's WebSocket mode: messages pass both ways as they are.

Theory of operation. A *session* is one client's connection. It has a *line* to each upstream that
it needs, and *lanes*: requests of one `stream_id` take turns, lanes run side by side. A *turn* is
one response.create: a request like any other, with its key, its place, its hold and its row.

Rule 1. What the client may send is an allow-list: response.create, and response.steer for a
response of this connection. A refusal is an error event, and the connection stays.

Rule 2. An event belongs to the turn whose response it names. Where it names none it is its lane's;
a response that is new is that of the turn which waits for one. What an upstream reports for no turn
(a response nobody asked for, or one that comes after it was given up) gets a row of its own:
nothing that was used passes unwritten.

Rule 3. A steered response may be followed by another, by itself. What that can cost is held before
the steering goes on; it has its own row, in its turn's place.

Rule 4. A line has one fate. There is no way to stop a single response, so when a turn's time is up
its line is closed, and the other turns on it fail as they do when the upstream is gone. When the
last line has ended, so does the session, unless the gateway gave it up for a message that the
upstream has answered but does not read: then the next request opens another line.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec
import orjson
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from redbtc.billing.spending import Hold
from redbtc.deadlines import MAX_EXPIRED, TICK
from redbtc.errors import StorageUnavailable
from redbtc.gateway.endpoints import RESPONSES
from redbtc.gateway.maximum import maximum_of_unknown
from redbtc.gateway.references import required_upstreams, upstreams_for
from redbtc.gateway.settlement import account_for, bill, count_containers, locations_of
from redbtc.gateway.state import Gateway
from redbtc.gateway.websocket_turns import Lane, Stray, Turn, is_lane, kind_of, response_named
from redbtc.gateway.websocket_upstream import UpstreamSocket, UpstreamSocketLost
from redbtc.headers import Headers, header
from redbtc.limits.admission import Admission
from redbtc.limits.memory import FREE_BYTES, Reservation
from redbtc.limits.rates import Bucket
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import MAX_AT_ONCE, Answer, answer_steps, decode_answer
from redbtc.meter.estimates import Estimate, SeenOutput, estimate, is_complete
from redbtc.refusals import ClientLeft, Refusal, not_found, refusal_of
from redbtc.request_body.body import ClientEvent
from redbtc.request_body.facts import DEFAULT_IMAGE_MODEL
from redbtc.request_body.pieces import Buffer, check_utf8
from redbtc.server.asgi import Receive, Scope, Send, new_request_id
from redbtc.server.websocket_protocol import (
    CLOSING_SECONDS,
    INTERNAL_ERROR,
    INVALID_DATA,
    POLICY_VIOLATION,
    REFUSED,
    REFUSED_FRAMES,
    SMALL_BYTES,
    SMALL_FRAMES_PER_MINUTE,
    UNSUPPORTED_DATA,
    UPGRADE,
    Intake,
)
from redbtc.slices import answers_of, in_slices
from redbtc.store.keys import Key
from redbtc.store.requests import Admitted, settle
from redbtc.upstream.headers import headers_for_client, headers_for_upstream
from redbtc.upstream.upstreams import Upstream, by_turn
from redbtc.usage import Outcome, RequestRow

MAX_SESSIONS = 100  # of an account
MAX_WAITING = 1000  # requests of a connection that have not left for an upstream
MAX_STRAYS = 16  # responses of a line that no request asked for, whose events are metered
NO_CODES = (1005, 1006, 1015)  # RFC 6455 §7.4.1: these must not be sent
NO_WEBSOCKET = (400, 404, 405, 426, 501)  # what an upstream without it answers
HANDSHAKE_HEADERS = (b"sec-websocket-", b"content-", b"date", b"connection", b"upgrade")
MAX_PAUSE = 30  # seconds that refused events can pause reading; a ping waits 60 for its answer


class FrameMemory:
    """The memory of a request that waits for its places."""

    def __init__(self, session: WebSocketSession, frame: ClientEvent) -> None:
        self._session = session
        self._frame = frame

    def release(self) -> None:
        """Give it back, if that has not been done."""
        self._session.leave(self._frame)


class WebSocketSession:
    """One client's WebSocket."""

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self.gateway = gateway
        self._scope = scope
        self._receive = receive
        self._send = send
        self._key: Key
        self._lanes: dict[str | None, Lane] = {}
        self._lines: set[UpstreamSocket] = set()
        self._opening: dict[Upstream, asyncio.Task[UpstreamSocket]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._made: dict[str, ObjectLocation] = {}  # on this connection, stored or not
        self._written: set[str] = set()  # responses whose usage is in the ledger
        self._waiting: dict[ClientEvent, Admission] = {}  # requests that have no place yet
        self._reserved: Reservation  # memory for those, and for the message that is being read
        self._small_frames: Bucket
        self._deadline = 0.0  # seconds for the client to read
        self._sends, self._given = 0, 0  # messages that wait for that, and that need not
        self._watching: asyncio.TimerHandle
        self._accepted = asyncio.Event()  # the client may be sent events
        self._closed = False  # to the client
        self._expired = False

    @property
    def account_id(self) -> str:
        """The id of the account that the session belongs to."""
        return self._key.account_id

    async def run(self) -> None:
        """From the handshake to the end. Raises Refusal before the connection is accepted,
        ClientLeft."""
        await self._receive()  # that it wants to connect
        self._key = self.gateway.enter(self._scope)
        self._charge_handshake()
        sessions, account_id = self.gateway.sessions, self._key.account_id
        if sessions[account_id] >= MAX_SESSIONS:
            message = f"This account has {MAX_SESSIONS} WebSockets open, which is the most."
            raise Refusal("concurrency_limit_exceeded", message)
        sessions[account_id] += 1
        try:
            with self.gateway.in_flight.abortable(self._key, self._scope["abort"]):
                await self._run()
        except OSError:
            raise ClientLeft from None
        finally:
            await self._end()
            sessions[account_id] -= 1

    def _charge_handshake(self) -> None:
        """Count the handshake as REFUSED_FRAMES small frames: each one connects to an upstream.
        Raises Refusal where the account's rate is used up."""
        frames = self.gateway.limits.small_frames(self._key)
        frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
        wait = frames.seconds_until(REFUSED_FRAMES)
        if wait:
            message = "Too many WebSocket handshakes and small frames of this account."
            raise Refusal("rate_limit_exceeded", message, retry_after=wait)
        frames.charge(REFUSED_FRAMES)

    async def _run(self) -> None:
        line = await self._first_line()
        self._deadline = line.upstream.settings.idle_timeout_seconds
        await self._send({"type": "websocket.accept", "headers": self._headers(line.connection)})
        self._accepted.set()
        self.gateway.watch.answered(self._scope, 101)
        most, loop = line.upstream.settings.total_timeout_seconds, self.gateway.clocks.loop
        expiry = loop.call_later(most, self._expire)
        self._watch_reading(-1)
        self._reader = asyncio.create_task(self._read_frames())
        try:
            await self._read()
        finally:
            expiry.cancel()
            self._watching.cancel()
            loop.call_later(CLOSING_SECONDS, self._scope["abort"])

    async def _read_frames(self) -> None:
        """Read frames until the client's connection ends, which can be after the session's end."""
        intake = Intake(self.gateway, self._key)
        self._reserved, self._small_frames = intake.reserved, intake.small_frames
        try:
            await self._scope["read_frames"](intake)
        except Exception as error:
            self.gateway.watch.failed(self._scope, error)
            self._scope["abort"]()

    def _headers(self, connection: ClientConnection) -> Headers:
        """Those of the handshake, for the client."""
        assert connection.response is not None, "the handshake is over"
        request_id, given = self._scope["request_id"].encode(), connection.response.headers
        headers = headers_for_client(
            [(name.encode(), value.encode("latin-1")) for name, value in given.raw_items()]
        )
        headers = [each for each in headers if not each[0].startswith(HANDSHAKE_HEADERS)]
        if header(headers, b"x-request-id") is None:
            headers.append((b"x-request-id", request_id))
        return [*headers, (b"x-redbtc-request-id", request_id)]

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it has it; there may be nobody

    def _expire(self) -> None:
        """No new requests; when those in flight are done, it ends."""
        self._expired = True
        if not self._lanes:
            self.start(self._refuse(expired(), None, close=POLICY_VIOLATION))

    def _watch_reading(self, given: int) -> None:
        """Let go of a client that has read nothing since so many messages were given to it."""
        if self._sends and self._given == given:
            self._scope["abort"]()
        again, loop = self._watch_reading, self.gateway.clocks.loop
        self._watching = loop.call_later(self._deadline, again, self._given)

    async def _end(self) -> None:
        """The client is gone: what is in flight may be read on for its usage, then all ends."""
        self._closed = True
        self._accepted.set()  # there is nobody to be waited for
        turns = [lane.turn for lane in self._lanes.values() if lane.turn]
        for turn in turns:
            turn.clock.client_left = True  # it begins nothing more
        for lane in self._lanes.values():
            while lane.waiting:
                frame = lane.waiting.popleft()
                self._waiting[frame].refund()
                self.leave(frame)
        for number, turn in enumerate(turns, 1):
            turn.clock.on_client_disconnect()
            if number % MAX_EXPIRED == 0:
                await asyncio.sleep(0)  # its tasks have something to do now
        while self._lanes:
            await asyncio.sleep(TICK)
        for opening in self._opening.values():
            opening.cancel()
        for line in list(self._lines):
            await line.close()
            await asyncio.wait({line.passing})  # it writes down what was nobody's
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Lines

    async def _first_line(self) -> UpstreamSocket:
        """Connect to an upstream before the client is answered, so that a refusal of a WebSocket is
        ours, too."""
        speaking = [each for each in self.gateway.upstreams if each.speaks_websocket]
        usable = [upstream for upstream in speaking if upstream.usable]
        if not usable:
            raise Refusal("no_upstream", retry_after=5)
        refused = "upstream_unreachable"
        for upstream in by_turn(usable):
            try:
                return await self._line_to(upstream)
            except OSError:
                continue
            except Refusal as refusal:
                refused = refusal.code
        raise Refusal(refused, headers=UPGRADE if refused == "upgrade_required" else ())

    async def _line_to(self, upstream: Upstream) -> UpstreamSocket:
        """The line to an upstream, a new one where there is none. Raises OSError, Refusal."""
        for line in self._lines:
            if line.upstream is upstream and not line.lost:
                return line
        if upstream not in self._opening:
            self._opening[upstream] = task = self.start(self._open(upstream))
            task.add_done_callback(lambda _: self._opening.pop(upstream))
        return await asyncio.shield(self._opening[upstream])

    async def _open(self, upstream: Upstream) -> UpstreamSocket:
        account_id, store = self._key.account_id, self.gateway.store
        headers = headers_for_upstream(self._scope["headers"], store, account_id)
        try:
            connection = await upstream.connect(headers)
        except InvalidStatus as error:
            if error.response.status_code in NO_WEBSOCKET:
                raise Refusal("upgrade_required") from None
            raise Refusal("upstream_unreachable") from None
        except InvalidHandshake:
            raise Refusal("upstream_protocol_error") from None
        line = UpstreamSocket(self, upstream, connection)
        self._lines.add(line)
        line.passing = self.start(self._pass_events(line))
        return line

    def _turns_on(self, line: UpstreamSocket) -> list[Turn]:
        """Those that are not done, in the order of their lanes."""
        turns = [lane.turn for lane in self._lanes.values() if lane.turn]
        return [turn for turn in turns if turn.line is line and not turn.done]

    def _lose(self, line: UpstreamSocket, outcome: Outcome = "upstream_failed") -> None:
        """Nothing that comes from it is passed on any more."""
        line.lost = True
        for turn in self._turns_on(line):
            turn.lose(outcome)

    def _give_up(self, line: UpstreamSocket) -> None:
        """Close a line whose upstream has answered a message that it does not read to its end. No
        other message can follow on it."""
        line.given_up = True
        self._lose(line)
        self.start(line.close())

    # From the client

    async def _read(self) -> None:
        while (message := await self._receive())["type"] != "websocket.disconnect":
            if message["type"] == REFUSED:
                self._count(self._new_scope(), message["refusal"])
                await self._refuse(message["refusal"], None, message["close"])
            elif "text" in message:
                await self._take(message["text"], message["reserved"])
            else:
                self._reserved.give_back(message["reserved"])
                await self._close(UNSUPPORTED_DATA, "Only text is understood here.")

    async def _take(self, text: Buffer, reserved: int) -> None:
        """One message. Its memory is given back unless it waits for a place."""
        frame: ClientEvent | None = None
        try:
            key = self.gateway.enter(self._scope)
            with self.gateway.limits.charge(key, self.gateway.settings.limits) as admission:
                frame = await in_slices(ClientEvent.read(text), key.account_id)
                if frame.excess_bytes:
                    await self._reserved.take(frame.excess_bytes, None)
                    reserved += frame.excess_bytes
                await self._act(frame, admission)
        except (Refusal, MemoryError) as error:
            refusal = refusal_of(error)
            self._count(self._new_scope(), refusal)
            close = closing_code(refusal)
            if refusal.code == "invalid_json" and not await is_utf8(text, self.account_id):
                close = INVALID_DATA
            stream_id = frame.facts.stream_id if frame else stream_id_in(text)
            await self._refuse(refusal, stream_id, close)
        except ConnectionClosed:
            pass  # the turn's end is on its way
        if frame not in self._waiting:
            self._reserved.give_back(reserved)

    def _count(self, scope: Scope, refusal: Refusal) -> None:
        """Charge an event that is refused: so many small frames would be as much work. At most
        MAX_PAUSE is owed, since many requests that wait can be refused at once."""
        self._small_frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
        if self._small_frames.seconds_until(REFUSED_FRAMES) < MAX_PAUSE:
            self._small_frames.charge(REFUSED_FRAMES)
        self.gateway.watch.refused(scope, refusal)

    async def _act(self, frame: ClientEvent, admission: Admission) -> None:
        facts = frame.facts
        if facts.type == "response.steer":
            await self._steer(frame, admission)
            return
        if facts.type != "response.create":
            message = "'type' is missing."
            if facts.type is not None:
                message = f"'{facts.type}' is not an event that is understood here."
            raise Refusal("invalid_request", message, param="type")
        frame.check_model(needed=True)
        if len(self._waiting) >= MAX_WAITING:
            raise Refusal("concurrency_limit_exceeded", "Too many requests wait for their turn.")
        self._waiting[frame] = admission
        lane = self._lanes.get(facts.stream_id)
        if lane is None:
            lane = self._lanes[facts.stream_id] = Lane(facts.stream_id)
            self.start(self._work(lane))
        lane.waiting.append(frame)

    async def _steer(self, frame: ClientEvent, admission: Admission) -> None:
        """More input for a response that is in flight on this connection."""
        frame.check_steering()
        response_id = frame.facts.previous_response_id or ""
        if frame.offers_tools:
            raise Refusal("invalid_request", "Steering offers no tools.", param="input")
        turns = [lane.turn for lane in self._lanes.values() if lane.turn and lane.turn.line]
        for turn in turns:
            if response_id and turn.response_id == response_id and not turn.settled:
                key = self.gateway.enter(self._scope)
                await required_upstreams(self.gateway, key, frame, self._made)
                await turn.steer(response_id, frame, admission)
                if (line := turn.line) and not line.lost:
                    await line.send_within(frame.sent, line.upstream.settings.idle_timeout_seconds)
                return
        raise not_found("previous_response_id", response_id)

    def _new_scope(self) -> Scope:
        return {
            "request_id": new_request_id(),
            "started": time.monotonic(),
            "where": RESPONSES.path,
            "headers": self._scope["headers"],
        }

    async def _work(self, lane: Lane) -> None:
        while lane.waiting:
            frame, scope = lane.waiting.popleft(), self._new_scope()
            turn = lane.turn = Turn(self, lane, scope, self._waiting[frame], self._key, frame)
            try:
                with turn.admission:
                    await self._create(turn, frame)
            except Refusal as refusal:
                self._count(scope, refusal)
                await self._refuse(refusal, lane.stream_id, closing_code(refusal))
            except ClientLeft:
                self.gateway.watch.left(scope)
            except Exception as error:
                self.gateway.watch.failed(scope, error)
                await self._refuse(refusal_of(error), lane.stream_id, INTERNAL_ERROR)
            finally:
                self.leave(frame)
                lane.turn = None
        del self._lanes[lane.stream_id]
        if self._expired and not self._lanes:
            self._expire()

    async def _create(self, turn: Turn, frame: ClientEvent) -> None:
        """Raises Refusal, ClientLeft."""
        gateway, facts = self.gateway, frame.facts
        if self._expired:
            turn.admission.refund()
            raise expired()
        if self._closed:
            raise ClientLeft
        key = turn.key = gateway.enter(self._scope)
        if facts.background:
            message = "A background response can't be created over a WebSocket."
            raise Refusal("invalid_request", message, param="background")
        upstreams = await upstreams_for(gateway, key, frame, self._made)
        speaking = [upstream for upstream in upstreams if upstream.speaks_websocket]
        if not speaking:
            raise Refusal("no_upstream", "No upstream takes this model over a WebSocket.")
        here = {line.upstream for line in self._lines}
        speaking.sort(key=lambda upstream: upstream not in here)
        memory = FrameMemory(self, frame)
        with gateway.serving(None, turn.clock, key), turn.holds:
            async with turn.admitted(speaking[0], memory):
                await self._forward(turn, frame, speaking)

    def leave(self, frame: ClientEvent) -> None:
        """Give back the memory of a request that no longer waits for a place."""
        if self._waiting.pop(frame, None):
            self._reserved.give_back(max(len(frame.sent), SMALL_BYTES) + frame.excess_bytes)

    async def _forward(self, turn: Turn, frame: ClientEvent, upstreams: list[Upstream]) -> None:
        total = upstreams[0].settings.total_timeout_seconds
        try:
            with turn.clock.running(total, turn.grace()):
                line = await self._connect(turn, upstreams)
                if turn.clock.client_left:
                    raise TimeoutError
                turn.line = line
                turn.clock.allow(line.upstream.settings.first_byte_timeout_seconds)
                line.upstream.in_flight += 1
                try:
                    if await line.send(frame.sent, turn.over):
                        await turn.over
                    elif not turn.failure:
                        self._give_up(line)
                finally:
                    line.upstream.in_flight -= 1
            if turn.failure:
                await self._fail(turn, turn.failure, "upstream_unreachable")
                await line.connection.wait_closed()  # until then its place is taken
        except TimeoutError:
            await self._time_out(turn)
        except ConnectionClosed:
            turn.lose("upstream_failed")
            await self._fail(turn, turn.failure or "upstream_failed", "upstream_unreachable")
        except UpstreamSocketLost:
            await self._fail(turn, "upstream_failed", "upstream_unreachable")

    async def _connect(self, turn: Turn, upstreams: list[Upstream]) -> UpstreamSocket:
        for upstream in upstreams:
            turn.leaves_for(upstream)
            turn.clock.allow(upstream.settings.connect_timeout_seconds + 1)  # it keeps it itself
            with contextlib.suppress(OSError, Refusal):
                return await self._line_to(upstream)
        raise UpstreamSocketLost

    async def _time_out(self, turn: Turn) -> None:
        """Its time is up: that of the upstream, or of a client that is gone or doesn't read."""
        if turn.settled:
            return
        line, left = turn.line, turn.clock.client_left
        if left and not line:
            await turn.forget()
        outcome: Outcome = "upstream_failed"
        if left or (line and line.waits_for_client):
            outcome = "client_disconnected"
        if line:
            self._lose(line, outcome)
        await self._fail(turn, outcome, "upstream_timeout")
        if line:
            await line.close()

    async def _fail(self, turn: Turn, outcome: Outcome, failure: str) -> None:
        """It ended before its response did: write down how, and say so."""
        if turn.settled:
            return
        refusal = Refusal(failure)
        if outcome == "upstream_failed" and turn.first_byte_ms is None:
            turn.status = refusal.status  # all that the client gets is the error
        await turn.settle(outcome)
        if outcome == "upstream_failed":
            await self._refuse(refusal, turn.lane.stream_id)

    # From an upstream

    async def _pass_events(self, line: UpstreamSocket) -> None:
        """Until the upstream closes. With the last line the client's connection is closed, too, in
        the same way."""
        code, reason = INTERNAL_ERROR, "The upstream's connection was lost."
        await self._accepted.wait()  # an event can come with the upstream's handshake
        try:
            while True:
                await self._pass_event(line, await line.connection.recv())
        except ConnectionClosed as closed:
            if closed.rcvd and closed.rcvd.code not in NO_CODES and not line.lost:
                code, reason = closed.rcvd.code, closed.rcvd.reason
        except Exception as error:
            self.gateway.watch.failed(self._scope, error)
            await line.close()
        self._lose(line)
        outcome: Outcome = "client_disconnected" if self._closed else "upstream_failed"
        for stray in line.strays.values():
            await self._write_stray(stray, line, outcome)
        while any(lane.turn and lane.turn.line is line for lane in self._lanes.values()):
            await asyncio.sleep(TICK)  # they have something to say
        self._lines.remove(line)
        if not self._lines and not self._opening and not line.given_up:
            await self._close(code, reason)

    async def _pass_event(self, line: UpstreamSocket, message: str | bytes) -> None:
        if len(message) <= MAX_AT_ONCE:
            event = decode_answer(message)
        else:
            event = await in_slices(
                answer_steps(message), answers_of(self.account_id), started=True
            )
        if line.lost:
            return
        turn = None
        if event:
            turn = self._turn_of(event, line)
            if turn:
                await turn.take(event, line.upstream.settings.idle_timeout_seconds)
                if turn.billed and turn.response_id:
                    self._written.add(turn.response_id)
            else:
                await self._take_stray(event, line)
        line.waits_for_client = True
        await self._to_client(message)
        line.waits_for_client = False
        if turn and turn.done:
            turn.end()

    def _turn_of(self, event: Answer, line: UpstreamSocket) -> Turn | None:
        """Rule 2."""
        lane = self._lanes.get(event.stream_id) if is_lane(event.stream_id) else None
        if lane and lane.turn and lane.turn.line is line and not event.response:
            return None if lane.turn.done else lane.turn
        turns = self._turns_on(line)
        named = response_named(event)
        if named:
            for turn in turns:
                if turn.response_id == named:
                    return turn
            known = named in self._made and kind_of(event) != "response.created"
            turns = [turn for turn in turns if turn.waits_for_response and not known]
        in_lane = [turn for turn in turns if turn.lane.stream_id == event.stream_id]
        if in_lane or isinstance(event.stream_id, str):
            return in_lane[0] if in_lane else None
        if kind_of(event) == "error" and len(turns) > 1:
            turns = [turn for turn in turns if turn.waits_for_response]
        if named or len(turns) == 1:
            return turns[0] if turns else None
        for turn in turns:  # it is one of theirs
            turn.clock.allow(line.upstream.settings.idle_timeout_seconds)
        return None

    def remember(self, made: Mapping[str, ObjectLocation]) -> None:
        """What was made on this connection can be built on here, even if it isn't stored."""
        self._made.update(made)

    async def _take_stray(self, event: Answer, line: UpstreamSocket) -> None:
        """Meter an event that is no turn's, if it belongs to a response."""
        lane = event.stream_id if is_lane(event.stream_id) else None
        if event.response and lane not in line.strays and len(line.strays) < MAX_STRAYS:
            line.strays[lane] = Stray()
        if stray := line.strays.get(lane):
            await stray.meter.take(event, self.account_id)
            if stray.meter.ended:
                del line.strays[lane]
                report = stray.meter.report
                outcome: Outcome = "upstream_error" if report.failed else "completed"
                await self._write_stray(stray, line, outcome)

    async def _write_stray(self, stray: Stray, line: UpstreamSocket, outcome: Outcome) -> None:
        """Write what a response used that is no turn's."""
        report = stray.meter.report
        named = [report.response_id] if report.response_id else []
        used = is_complete(report) or outcome != "upstream_error" or SeenOutput.of(report)
        if not self._written.isdisjoint(named):  # it may have been an estimate
            await self.gateway.corrections.look(named[0], self._key.account_id, report)
            return
        if not used:
            return
        self._written.update(named)
        guess = None if is_complete(report) else await self._estimate(stray)
        scope = self._new_scope()
        row = RequestRow(
            request_id=scope["request_id"],
            account_id=self._key.account_id,
            key_id=self._key.id,
            endpoint=RESPONSES.path,
            requested_model=report.model or "",
            upstream=line.upstream.name,
            started_at=self.gateway.store.time(),
            duration_ms=0,
            status=200,
            model=report.model,
            service_tier=report.service_tier,
            response_id=report.response_id,
        )
        parts, money = account_for(row, report, outcome, guess), await self.no_hold(row)
        parts = await count_containers(self.gateway.containers, row, report, parts)
        bill(row, parts, self.gateway.books, money, DEFAULT_IMAGE_MODEL)
        homes = locations_of(
            named, report, ObjectLocation(row.upstream), None if guess else row.usage
        )
        self.gateway.objects.own_each(homes, row.account_id)
        admitted = Admitted(money.at, DEFAULT_IMAGE_MODEL, 0)
        await settle(self.gateway.store, row, admitted)
        self.gateway.watch.settled(scope, row)

    async def _estimate(self, stray: Stray) -> Estimate:
        """Return an estimate of what it used. What it read is not known."""
        report, worked = stray.meter.report, stray.worked_seconds
        speed = await self.gateway.speeds.of(report.model or "", self.account_id, False)
        return estimate(
            report,
            SeenOutput.of(report),
            written=math.ceil(worked * speed),
            read=0,
            maximum=maximum_of_unknown(self.gateway.settings.billing, 0),
            images=False,
            partly=False,
        )

    async def no_hold(self, row: RequestRow) -> Hold:
        """For what nobody was asked whether it may be: at the prices of now."""
        books = self.gateway.books
        while True:
            with contextlib.suppress(StorageUnavailable):
                return await books.hold_again(self._key, row.requested_model, books.store.time(), 0)
            await asyncio.sleep(TICK)

    # To the client

    async def _to_client(self, message: str | bytes) -> None:
        kind = "text" if isinstance(message, str) else "bytes"
        if not self._closed:
            await self._give({"type": "websocket.send", kind: message})

    async def _refuse(
        self, refusal: Refusal, stream_id: str | None, close: int | None = None
    ) -> None:
        headers = {name.decode(): value.decode() for name, value in refusal.headers}
        event: dict[str, Any] = {"type": "error", "status": refusal.status}
        event |= {"error": {**refusal.error(), "headers": headers}, "headers": headers}
        event |= {"stream_id": stream_id} if stream_id is not None else {}
        await self._to_client(orjson.dumps(event).decode())
        if close:
            await self._close(close, refusal.code)

    async def _close(self, code: int, reason: str) -> None:
        if not self._closed:
            self._closed = True
            await self._give({"type": "websocket.close", "code": code, "reason": reason[:100]})

    async def _give(self, message: dict[str, Any]) -> None:
        self._sends += 1
        try:
            await self._send(message)
            self._given += 1
        except (OSError, RuntimeError):
            self._closed = True  # by the client, or by another task a moment ago
        finally:
            self._sends -= 1


def closing_code(refusal: Refusal) -> int | None:
    """With which the connection ends, too: its key or account is in force no more."""
    durable = refusal.status in (401, 403) and refusal.code != "model_not_allowed"
    return POLICY_VIOLATION if durable else None


class Addressed(msgspec.Struct):
    """The one member of a frame that is needed to refuse it."""

    stream_id: str | None = None


ADDRESSED = msgspec.json.Decoder(Addressed)


def stream_id_in(text: Buffer) -> str | None:
    """The lane of a frame, whose refusal names it. Of a long frame it isn't looked for."""
    if len(text) <= FREE_BYTES:
        with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return ADDRESSED.decode(text).stream_id
    return None


async def is_utf8(text: Buffer, account_id: str) -> bool:
    try:
        await in_slices(check_utf8(text), account_id)
    except Refusal:
        return False
    return True


def expired() -> Refusal:
    """After an hour."""
    return Refusal("websocket_connection_limit_reached")
