"""A request that is forwarded to an upstream: what metered requests and requests for stored
responses have in common."""

from __future__ import annotations

import asyncio
import math
import time

from redbtc.deadlines import Deadline
from redbtc.gateway.asking import ask
from redbtc.gateway.body_recorder import BodyRecorder
from redbtc.gateway.endpoints import Endpoint
from redbtc.gateway.gateway import Gateway
from redbtc.limits.admission import Admission
from redbtc.meter.decoded_meter import DecodedMeter
from redbtc.meter.meters import JSONMeter, Meter
from redbtc.meter.streams import StreamMeter
from redbtc.refusals import ClientLeft, Refusal
from redbtc.server.asgi import ClientRequest
from redbtc.store.keys import Key
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome

REJECTED_KEY = "upstream_credentials_rejected"  # the error code of an upstream's 401 or 403
MAX_CAUSE = 100  # characters of a cause that the ledger takes


class ForwardedRequest:
    """A request that is forwarded, and its answer. `meter` has been fed what has passed of the
    answer."""

    makes_answer = False  # else the answer can tell of another request, such as a stored response
    recorder: BodyRecorder | None = None  # of its bodies, if they are logged

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
        self.member: Upstream | None = None  # whose answer the client gets, as far as is known
        self.left_at = math.inf  # when it left for the upstream, by the monotonic clock
        self.status: int | None = None  # of the answer that the client gets
        self.upstream_status: int | None = None  # of the upstream's last answer
        self.upstream_request_id: str | None = None  # of the same
        self.failure_cause: str | None = None  # why the upstream's last answer is missing or torn
        self.first_byte_ms: int | None = None
        self.unwritten: asyncio.Future[None] | None = None  # await it before sending more
        self.awaits_id = False  # the answer can create a background response; its id is not known

    @property
    def idempotency_scope(self) -> str:
        """The name of the set of requests that share idempotency keys: the account's id, with the
        digest of a client's own credential."""
        credential = self.client_request.credential
        if credential:
            return f"{self.key.account_id} {credential.digest}"
        return self.key.account_id

    def choose_meter(self, stream: bool) -> Meter:
        """Return the meter for an answer that is server-sent events, or not."""
        endpoint = self.endpoint
        if not stream:
            return JSONMeter(endpoint.images)
        return StreamMeter(
            images=endpoint.images,
            chat=endpoint.chat,
            audio=endpoint.audio,
            take_out_usage=self.takes_out_usage,
            ends=self.images,
            expects_usage=self.expects_usage(),
            hides_errors=self.hides_errors,
        )

    def catalog_etag(self) -> bytes | None:
        """Return the ETag of the model catalogue that the client gets, None if there is none."""
        with_credential = self.client_request.credential is not None
        return self.gateway.catalog.etag(self.key, with_credential)

    @property
    def hides_errors(self) -> bool:
        """Return whether the answer is searched for errors about the operator's credentials, which
        get the gateway's own text. An answer whose status is an error was judged by that."""
        is_good = (self.status or 200) < 400
        return is_good and self.member is not None and self.member.hides_errors

    def expects_usage(self) -> bool:
        """Return whether a streamed chat was asked to report its usage."""
        return self.takes_out_usage

    def meter_decoded(self, codings: list[bytes], labelled: bool, start: bytes) -> None:
        """Use a meter for a compressed answer. `labelled`: its content type is that of a stream.
        `start`: its first bytes, if they have been sent on already."""
        report = self.meter.report
        self.meter = DecodedMeter(report, codings, labelled, self.choose_meter, start)

    def grace(self) -> float:
        """Return how many seconds the upstream is read on after the client has left."""
        metering = self.settings.metering
        return metering.drain_seconds if metering.on_disconnect == "drain" else 0.0

    @property
    def creates_background(self) -> bool:
        """Return whether the upstream is asked to create a background response."""
        return False

    def first_byte_after_leaving(self) -> float | None:
        """Return how many milliseconds after the request was sent the first byte of its answer
        came, None if none has."""
        if self.first_byte_ms is None:
            return None
        return self.first_byte_ms - (self.left_at - self.client_request.started) * 1000

    @property
    def asks_for_events(self) -> bool:
        """Return whether the answer may be server-sent events."""
        return False

    def note_member(self, upstream: Upstream) -> None:
        """Note the member of the upstreams whose answer the client gets."""
        self.member = upstream

    def note_attempt(self, upstream: Upstream) -> None:
        """Note that the request is about to be sent to a member of the upstreams."""
        self.member = upstream
        self.left_at = time.monotonic()

    def note_answer(self, status: int, request_id: str | None) -> None:
        """Note the status of an answer of the upstream, and the upstream's id of the request. This
        is the answer that the client gets, unless another one is noted after it."""
        self.status = self.upstream_status = status
        self.upstream_request_id = request_id
        self.failure_cause = None

    def note_failure(self, cause: str | None) -> None:
        """Note why no answer of the upstream came, or why it broke off: one of the causes of
        docs/contract.md section 5, or the error code of an answer that is not passed on. The code
        of the answer that is passed on, if it has one, is recorded instead."""
        self.failure_cause = cause and cause[:MAX_CAUSE]

    def cause_of(self, outcome: Outcome) -> str | None:
        """Return why an answer failed that reports no error code; None if the upstream answered
        with an error status. A stream that ends without its last event breaks its protocol."""
        return self.failure_cause or ("protocol" if outcome == "upstream_failed" else None)

    def note_first_byte(self) -> None:
        """Note the time of the first byte of the answer's body."""
        self.first_byte_ms = self.elapsed_ms()

    def act_on_report(self) -> None:
        """Act on what the meter has found in the bytes that it was fed last."""

    async def settle(self, outcome: Outcome) -> None:
        """Record the end of the request. What still waits for that may be sent then."""
        raise NotImplementedError

    async def fail(self, failure: str) -> None:
        """Record that the upstream failed, and raise the Refusal with the code `failure`."""
        self.status = Refusal(failure).status
        await self.settle("upstream_error" if failure == REJECTED_KEY else "upstream_failed")
        raise Refusal(failure)  # kept in no variable: that would keep all of this in memory

    async def forget(self) -> None:
        """End a request whose client left before anything was sent, without a row. Raises
        ClientLeft."""
        self.admission.refund()
        raise ClientLeft

    async def ask_for_usage(self, response_id: str, upstream_name: str) -> None:
        """Ask the upstream for a response whose usage was estimated. Correct the estimate if the
        answer shows what was used. A response of a client's own credential is not asked for, also
        if the upstream gets the operator's by now."""
        upstream = self.gateway.upstreams.named(upstream_name)
        if upstream is None or self.member is None or self.member.is_client:
            return
        account_id = self.key.account_id
        status, report = await ask(upstream, f"/responses/{response_id}", account_id)
        if status == 200 and report.response_id == response_id:
            await self.gateway.corrections.correct_if_final(response_id, account_id, report)

    def outcome(self) -> Outcome:
        """Return how an answer ended, once nothing more of it comes."""
        if self.meter.report.failed or (self.status or 0) >= 400:
            return "upstream_error"
        if self.deadline.client_left:
            return "client_disconnected"
        is_complete = self.meter.state == "ended"
        return "completed" if is_complete else "upstream_failed"

    def elapsed_ms(self) -> int:
        """Return how long ago the request's head arrived, in milliseconds."""
        return round((time.monotonic() - self.client_request.started) * 1000)
