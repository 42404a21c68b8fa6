"""The running gateway: the parts that the ways of all requests share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from redbtc.billing.billing import Billing
from redbtc.config import Settings
from redbtc.deadlines import Deadline, Deadlines
from redbtc.gateway.authentication import key_in_headers
from redbtc.gateway.background_responses import BackgroundResponses
from redbtc.gateway.corrections import Corrections
from redbtc.gateway.in_flight import InFlight
from redbtc.limits.limiter import Limiter
from redbtc.refusals import Refusal
from redbtc.server.asgi import Client, ClientRequest
from redbtc.store.containers import Containers
from redbtc.store.keys import Key
from redbtc.store.objects import Objects
from redbtc.store.speeds import Speeds
from redbtc.telemetry import Telemetry
from redbtc.upstream.configured import Upstreams


class Gateway:
    """The parts of the running gateway, and the settings that are in force."""

    def __init__(
        self,
        billing: Billing,
        settings: Settings,
        telemetry: Telemetry,
        on_task_end: Callable[[asyncio.Task[Any]], None],
    ) -> None:
        """`on_task_end` is called with each task of background responses that has ended."""
        self.settings = settings
        self.store = billing.store
        self.billing = billing
        self.telemetry = telemetry
        self.limiter = Limiter()
        self.deadlines = Deadlines()
        self.upstreams = Upstreams(settings.upstreams)
        self.in_flight = InFlight()
        self.objects = Objects(billing.store)
        self.containers = Containers(billing.store)
        self.speeds = Speeds(billing.store)
        self.corrections = Corrections(billing, self.objects, self.containers)
        self.background = BackgroundResponses(
            billing,
            self.objects,
            self.containers,
            self.corrections,
            self.speeds,
            self.upstreams,
            telemetry,
            on_task_end,
        )
        self.sessions: Counter[str] = Counter()  # WebSocket sessions, by account
        self.started = time.monotonic()
        telemetry.show_gauge(
            "redbtc_in_flight", "Requests to /v1 in flight", lambda: self.in_flight.count
        )
        telemetry.show_gauge(
            "redbtc_queued", "Requests waiting for a free place", lambda: self.limiter.queued
        )
        self.draining = self.stopping = False

    def apply(self, settings: Settings) -> None:
        """Use other settings, from the next request on."""
        self.settings = settings
        self.billing.apply(settings.billing)
        self.upstreams.apply(settings.upstreams)

    def authenticate(self, request: ClientRequest) -> Key:
        """Return the key of a request that may come in. Raises Refusal."""
        if self.draining:
            raise Refusal("draining", headers=[(b"connection", b"close")])
        key = request.key = key_in_headers(request.headers, self.store)
        if maintenance := self.billing.notices.maintenance():
            wait = (maintenance.until - self.store.time()) / 1000
            raise Refusal("maintenance", maintenance.text, retry_after=wait)
        return key

    @contextlib.contextmanager
    def serving(self, client: Client | None, deadline: Deadline, key: Key) -> Iterator[None]:
        """Count a request as in flight; its deadline is told when the client leaves, or when it is
        to be aborted. `client` is None for a turn of a WebSocket, whose session sees to that."""
        on_leave: set[Callable[[], None]] = client.on_leave if client else set()

        def abort() -> None:
            deadline.abort()
            if client:
                client.abort()

        in_flight = self.in_flight
        in_flight.count += 1
        on_leave.add(deadline.on_client_disconnect)
        in_flight.add(key, abort)
        try:
            yield
        finally:
            in_flight.discard(key, abort)
            on_leave.discard(deadline.on_client_disconnect)
            in_flight.count -= 1

    def stop(self) -> None:
        """Abort all that is in flight: the process is about to end. What was used is estimated."""
        self.stopping = True
        self.in_flight.abort_all()
