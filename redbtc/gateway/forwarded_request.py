"""A request that is forwarded to an upstream: what metered requests and requests for stored
responses have in common."""

from __future__ import annotations

import asyncio
import time

from redbtc.deadlines import Deadline
from redbtc.gateway.asking import ask
from redbtc.gateway.endpoints import Endpoint
from redbtc.gateway.gateway import Gateway
from redbtc.limits.admission import Admission
from redbtc.meter.decoded_meter import DecodedMeter
from redbtc.meter.meters import JSONMeter, Meter, MeterState
from redbtc.meter.streams import StreamMeter
from redbtc.refusals import ClientLeft, Refusal
from redbtc.server.asgi import ClientRequest
from redbtc.store.keys import Key
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome


class ForwardedRequest:
    """A request that is forwarded, and its answer. `meter` has been fed what has passed of the
    answer."""

    def __init__(
        self,
        gateway: Gateway,
        client_request: ClientRequest,
        endpoint: Endpoint,
        deadline: Deadline,
        admission: Admission,
        key: Key,
    ) -> None:
        self.gateway = gateway
        self.settings = gateway.settings
        self.client_request = client_request
        self.endpoint = endpoint
        self.deadline = deadline
        self.admission = admission
        self.key = key
        self.meter: Meter = JSONMeter(endpoint.images)
        self.takes_out_usage = False
        self.images = 1  # that were asked for, each of which ends with an event of its own
        self.settled = False
        self.status: int | None = None  # of the answer
        self.first_byte_ms: int | None = None
        self.unwritten: asyncio.Future[None] | None = None  # await it before sending more
        self.awaits_id = False  # the answer can create a background response; its id is not known

    @property
    def repeatable_by(self) -> str:
        """A name for the requests among which idempotency keys are shared: the account's id."""
        return self.key.account_id

    def choose_meter(self, stream: bool) -> Meter:
        """Return the meter for an answer that is server-sent events, or not."""
        endpoint = self.endpoint
        if not stream:
            return JSONMeter(endpoint.images)
        return StreamMeter(
            images=endpoint.images,
            chat=endpoint.chat,
            take_out_usage=self.takes_out_usage,
            ends=self.images,
            expects_usage=self.expects_usage(),
        )

    def expects_usage(self) -> bool:
        """Return whether a streamed chat was asked to report its usage."""
        return self.takes_out_usage

    def meter_decoded(self, codings: list[bytes], labelled: bool, start: bytes) -> None:
        """Use a meter for a compressed answer. `labelled`: its content type is that of a stream.
        `start`: its first bytes, if they have been sent on already."""
        report = self.meter.report
        self.meter = DecodedMeter(report, codings, labelled, self.choose_meter, start)

    def grace(self) -> float:
        """Return for how many seconds the upstream is read on when the client has left."""
        metering = self.settings.metering
        return metering.drain_seconds if metering.on_disconnect == "drain" else 0.0

    def note_upstream(self, upstream: Upstream) -> None:
        """Note that the request is about to be sent to an upstream."""

    def note_status(self, status: int) -> None:
        """Note the status of the upstream's answer."""
        self.status = status

    def note_first_byte(self) -> None:
        """Note the time of the first byte of the answer's body."""
        self.first_byte_ms = self.elapsed_ms()

    def act_on_report(self) -> None:
        """Act on what the meter has found in the bytes that it was fed last."""

    async def settle(self, outcome: Outcome) -> None:
        """Record the end of the request. What still waits for that may be sent then."""
        raise NotImplementedError

    async def fail(self, failure: str) -> None:
        """Record a failure of the upstream of which the client is told by the error of that code,
        and raise the Refusal."""
        self.status = Refusal(failure).status
        await self.settle("upstream_failed")
        raise Refusal(failure)  # kept in no variable: that would keep all of this in memory

    async def forget(self) -> None:
        """End a request whose client left before anything was sent, without a row. Raises
        ClientLeft."""
        self.admission.refund()
        raise ClientLeft

    async def ask_for_usage(self, response_id: str, upstream_name: str) -> None:
        """Ask the upstream for a response of which only an estimate is known, and correct that if
        the answer shows what was used."""
        upstream = self.gateway.upstreams.named(upstream_name)
        if upstream is None:
            return
        account_id = self.key.account_id
        status, report = await ask(upstream, f"/responses/{response_id}", account_id)
        if status == 200 and report.response_id == response_id:
            await self.gateway.corrections.correct_if_final(response_id, account_id, report)

    def outcome(self) -> Outcome:
        """Return how an answer ended of which nothing more comes."""
        if self.meter.report.failed or (self.status or 0) >= 400:
            return "upstream_error"
        if self.deadline.client_left:
            return "client_disconnected"
        is_complete = self.meter.state is MeterState.ENDED
        return "completed" if is_complete else "upstream_failed"

    def elapsed_ms(self) -> int:
        """Return how long ago the request's head had arrived, in milliseconds."""
        return round((time.monotonic() - self.client_request.started) * 1000)
