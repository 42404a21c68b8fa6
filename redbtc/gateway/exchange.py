"""What an answer means for a request: the part that metered and stored requests share."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import httpx2

from redbtc.config import Settings
from redbtc.deadlines import Deadline
from redbtc.limits import Admission
from redbtc.meter.decoding import DecodedMeter
from redbtc.meter.estimates import MaximumUsage
from redbtc.meter.meters import JSONMeter, Meter
from redbtc.meter.report import Report
from redbtc.meter.streams import StreamMeter
from redbtc.refusals import NO_RETRY, ClientLeft, Refusal
from redbtc.server.asgi import Scope
from redbtc.slices import in_slices
from redbtc.store.keys import Key
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome

if TYPE_CHECKING:
    from redbtc.gateway.state import Gateway


USUAL_PICTURES = 4  # held for the image tool where a request has no 'max_tool_calls'
# In case the process is killed, the ledger keeps what a request has used: first after
# PRESERVE_SECONDS of work, then after PRESERVE_GROWTH times as long as the last time, and so on.
PRESERVE_SECONDS, PRESERVE_GROWTH = 1.0, 4


class Endpoint(NamedTuple):
    """A route whose requests are metered, and what is particular to it."""

    path: str
    chat: bool = False
    images: bool = False
    forms: bool = False
    stores: bool = False  # what it answers may be kept at the upstream
    free: bool = False  # and costs nothing
    # The members that limit the output tokens of an answer, of which the largest counts. Others,
    # which the upstream ignores here, count for nothing.
    limits: tuple[str, ...] = ()
    runs_tools: bool = False  # the upstream does, at most `max_tool_calls` times

    @property
    def model_needed(self) -> bool:
        """Images have a usual one."""
        return not self.images

    @property
    def has_number(self) -> bool:
        """Whether `n` says how many answers or images are asked for."""
        return self.chat or self.images


def check_background(value: bool | str) -> None:
    """Raise Refusal if `background` is text, which an upstream might take for true. (In a request
    for images, which has no background responses, it is a colour.)"""
    if isinstance(value, str):
        message = "'background' must be true or false."
        raise Refusal("invalid_request", message, param="background")


def most_usual(settings: Settings, input_tokens: int) -> MaximumUsage:
    """Return the most that a request can use of which nothing but its input is known."""
    usual, calls = settings.billing.hold_output_tokens, settings.billing.hold_tool_calls
    return MaximumUsage(input_tokens, usual, usual, calls, min(USUAL_PICTURES, calls))


def insufficient_quota(message: str) -> Refusal:
    """Return the refusal of a request that can cost more than its balance or budget has left."""
    return Refusal("insufficient_quota", message, headers=[NO_RETRY])


def unmetered() -> Refusal:
    """Return the refusal of a streamed chat whose usage would not be reported, though it is billed
    by that."""
    message = (
        "This stream would not report its usage, by which it is billed. Send "
        '"stream_options": {"include_usage": true}. It can be left out of a body that is not '
        "compressed, unless the gateway is set to change no body."
    )
    return Refusal("invalid_request", message, param="stream_options")


class ForwardedRequest:
    """What is the same for all that is forwarded. `meter` has been fed what has passed."""

    def __init__(
        self,
        gateway: Gateway,
        scope: Scope,
        endpoint: Endpoint,
        clock: Deadline,
        admission: Admission,
    ) -> None:
        self.gateway = gateway
        self.settings = gateway.settings
        self.scope = scope
        self.endpoint = endpoint
        self.clock = clock
        self.admission = admission
        self.meter: Meter = JSONMeter(endpoint.images)
        self.takes_out_usage = False
        self.answers = 1  # images that were asked for, each of which ends with an event of its own
        self.settled = False
        self.status: int | None = None
        self.first_byte_ms: int | None = None
        self.unwritten: asyncio.Future[None] | None = None  # await it before sending more
        self.awaits_id = False  # the answer can create a background response; its id is not known
        self.key: Key

    @property
    def repeatable_by(self) -> str:
        """The name of those who share idempotency keys: the account."""
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
            ends=self.answers,
            expects_usage=self.expects_usage(),
        )

    def expects_usage(self) -> bool:
        """Whether a streamed chat was asked to report its usage."""
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

    def to(self, upstream: Upstream) -> None:
        """It is about to leave for that one."""

    def note(self) -> None:
        """The meter was fed."""

    async def settle(self, outcome: Outcome) -> None:
        """It is over; what still waits for that may be sent then."""
        raise NotImplementedError

    async def ask_for_usage(self, response_id: str, upstream_name: str) -> None:
        """Ask the upstream for a response of which only an estimate is known, and correct that if
        the answer shows what was used."""
        upstream = self.gateway.upstream_named(upstream_name)
        if upstream is None:
            return
        account_id = self.key.account_id
        status, report = await ask(upstream, f"/responses/{response_id}", account_id)
        if status == 200 and report.response_id == response_id:
            await self.gateway.corrections.look(response_id, account_id, report)

    async def forget(self) -> None:
        """The client left before anything was sent: nothing was used. Raises ClientLeft."""
        self.admission.put_back()
        raise ClientLeft

    def outcome(self) -> Outcome:
        """Of an answer that has come to its end, one way or the other."""
        if self.meter.report.failed or (self.status or 0) >= 400:
            return "upstream_error"
        if self.clock.client_left:
            return "client_disconnected"
        return "completed" if self.meter.ended else "upstream_failed"

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - float(self.scope["started"])) * 1000)


async def ask(
    upstream: Upstream, path: str, account_id: str, method: str = "GET"
) -> tuple[int, Report]:
    """Send a request of the gateway's own about a response of the account. Return the status of the
    upstream's answer, 0 where there is none, and what the answer reports."""
    meter = JSONMeter(images=False)
    try:
        status = await upstream.fetch(path, meter.steps, method)
    except (httpx2.HTTPError, TimeoutError):
        return 0, meter.report
    await in_slices(meter.finishing(), account_id)
    return status, meter.report


RESPONSES = Endpoint("/v1/responses", stores=True, limits=("max_output_tokens",), runs_tools=True)
