"""The running gateway: the parts that all requests share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from typing import Any, Protocol

from redbtc.admin.outputs import Reloaded
from redbtc.billing.billing import Billing
from redbtc.codex.catalog import read_catalog
from redbtc.config import Settings
from redbtc.deadlines import Deadline, Deadlines
from redbtc.gateway.authentication import key_of_request
from redbtc.gateway.background_responses import BackgroundResponses
from redbtc.gateway.corrections import Corrections
from redbtc.gateway.in_flight import InFlight
from redbtc.gateway.model_catalog import ModelCatalog
from redbtc.gateway.upstream_journal import UpstreamJournal
from redbtc.limits.limiter import Limiter
from redbtc.refusals import Refusal
from redbtc.server.asgi import Client, ClientRequest
from redbtc.store.containers import Containers
from redbtc.store.keys import Key
from redbtc.store.objects import Objects
from redbtc.store.request_log import RequestLog
from redbtc.store.speeds import Speeds
from redbtc.telemetry import Telemetry, log
from redbtc.upstream.configured import Upstreams

ADMIT_SECONDS = 10.0  # for a request to go on in the process that has taken over
ADMIT_LOOK_SECONDS = 0.01


class Session(Protocol):
    """A session over a WebSocket."""

    def expire(self) -> None:
        """Begin no more requests. Close the connection when those in flight have ended."""

    def move(self) -> None:
        """Do what `expire` does, and refuse requests that are not admitted yet."""

    @property
    def has_waiting(self) -> bool:
        """Return whether a request is not admitted yet."""


class Gateway:
    """The parts of the running gateway, and the settings that are in force."""

    def __init__(
        self,
        billing: Billing,
        settings: Settings,
        telemetry: Telemetry,
        on_task_end: Callable[[asyncio.Task[Any]], None],
        request_log: RequestLog,
    ) -> None:
        """`on_task_end` is called with each task of background responses that has ended. Raises
        SettingsError if a file that the settings name can't be used."""
        self.settings = settings
        self.key_headers = names_of(settings.server.key_headers)
        self.store = billing.store
        self.request_log = request_log
        self.billing = billing
        self.telemetry = telemetry
        self.limiter = Limiter()
        self.deadlines = Deadlines()
        self.journal = UpstreamJournal(billing.store, billing.messages, log)
        self.upstreams = Upstreams(settings.upstreams, self.journal.note)
        self.catalog = ModelCatalog(settings.codex, billing, self.upstreams)
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
        self.operations = 0  # requests of commands, users and accounts that are being answered
        self.checks = 0  # those of them that check the database, which can take minutes
        self.draining = self.stopping = False
        self.ends_sessions = False  # WebSockets end with the requests that are in flight
        self.admits = True  # False: another process does, which knows no request that begins here
        self.websockets: set[Session] = set()
        # Lets a new process take over; set when this one serves.
        self.reload: Callable[[], Awaitable[Reloaded]]
        self.settings_applied = asyncio.Event()  # set by the next `apply`

    async def resume(self, followed: Collection[str] = ()) -> None:
        """Take up what an earlier process has left, but not the background responses that another
        process still follows. Raises StorageUnavailable, sqlite3.Error."""
        await self.background.resume(followed)
        outages = self.upstreams.outages()  # that the process before this one has found
        members = {each.name: each.usable and each.name not in outages for each in self.upstreams}
        for rest in await self.journal.resume(members):
            seconds = (rest.until - self.store.time()) / 1000
            self.upstreams.restore(rest.upstream, rest.model, seconds, rest.reason)
        self.journal.go_on_with({name: each.reason for name, each in outages.items()})
        self.upstreams.let_last_serve()

    def apply(self, settings: Settings) -> None:
        """Use other settings, from the next request on. Raises SettingsError, and keeps the old
        ones, if a ca_file or the model catalogue can't be used."""
        models = read_catalog(settings.codex.catalog)
        before = {each.name: each.health for each in self.upstreams}
        self.upstreams.apply(settings.upstreams)
        self.journal.forget_rests_but(before, {each.name: each.health for each in self.upstreams})
        self.settings = settings
        self.key_headers = names_of(settings.server.key_headers)
        self.billing.apply(settings.billing)
        self.request_log.apply(settings)
        self.catalog.apply(settings.codex, models)
        self.journal.forget_all_but({each.name for each in self.upstreams})
        self.settings_applied.set()
        self.settings_applied = asyncio.Event()

    def authenticate(self, request: ClientRequest) -> Key:
        """Return the key of a request that may be served now. Raises Refusal."""
        if request.key_headers is None:  # a WebSocket keeps the meaning of its headers
            request.key_headers = self.key_headers
        key = key_of_request(request, self.store, request.key_headers)
        if maintenance := self.billing.notices.maintenance():
            wait = (maintenance.until - self.store.time()) / 1000
            raise Refusal("maintenance", maintenance.text, retry_after=wait)
        return key

    @contextlib.contextmanager
    def serving(self, client: Client | None, deadline: Deadline, key: Key) -> Iterator[None]:
        """Count a request as in flight until the end of `with`. Meanwhile its deadline is told when
        the client leaves, and when the request is to be aborted. `client` is None for a turn of a
        WebSocket: its session watches the client."""
        on_leave: set[Callable[[], None]] = client.on_leave if client else set()

        def abort() -> None:
            deadline.abort(0 if self.stopping else deadline.abort_grace)
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

    async def until_it_admits(self) -> None:
        """Wait until requests are admitted, or until this one goes on in another process, which
        cancels it. Raises Refusal if neither comes."""
        until = time.monotonic() + ADMIT_SECONDS
        while not self.admits:
            if time.monotonic() > until:
                raise Refusal("draining")
            await asyncio.sleep(ADMIT_LOOK_SECONDS)

    def drain(self) -> None:
        """Let WebSockets end with the requests that are in flight, and tell monitors that the
        process is about to end."""
        self.draining = self.ends_sessions = True
        for session in list(self.websockets):
            session.expire()

    def stop(self) -> None:
        """Abort all that is in flight: the process is about to end. What was used is estimated."""
        self.stopping = True
        self.in_flight.abort_all()


def names_of(key_headers: Iterable[str]) -> frozenset[bytes]:
    """Return the names of server.key_headers as requests have them."""
    return frozenset(name.lower().encode() for name in key_headers)
