"""The running gateway: what its routes share."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import re
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import orjson
import prometheus_client
from msgspec.structs import asdict
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.routing import Route

from redbtc.admin.api import API
from redbtc.admin.http import served
from redbtc.admin.outputs import AtWork, UpstreamAtWork
from redbtc.billing.books import Billing
from redbtc.config import Settings
from redbtc.dashboard import status as status_module
from redbtc.dashboard.lazy import LazyDashboard
from redbtc.dashboard.sessions import SECURITY, actor_of, session_of
from redbtc.dashboard.status import prefers_html
from redbtc.deadlines import Deadline, Deadlines
from redbtc.errors import StorageUnavailable
from redbtc.gateway.authentication import authenticate
from redbtc.gateway.background_responses import BackgroundResponses
from redbtc.gateway.corrections import Corrections
from redbtc.gateway.handlers import AsApp, ExactRoute, age_header, received_until, upgrade_required
from redbtc.gateway.metered import MeteredRequest
from redbtc.gateway.stored import StoredRoute, not_own
from redbtc.gateway.vitals import Vitals
from redbtc.headers import Headers, header
from redbtc.limits import Admission, Limiter
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import MAX_NAME
from redbtc.money import NANOS, parse_amount
from redbtc.rates import DEFAULT_TIER, NEEDED
from redbtc.refusals import Refusal, not_found
from redbtc.request_body.content import RequestBody
from redbtc.request_body.pieces import Steps
from redbtc.server.asgi import App, Message, Receive, Scope, Send, ids_of, respond
from redbtc.server.cors import cors_headers, preflight_headers
from redbtc.slices import in_slices, with_turns
from redbtc.store.accounts import Account
from redbtc.store.containers import Containers
from redbtc.store.keys import Key
from redbtc.store.objects import MAX_LOOK_UPS, Objects
from redbtc.store.speeds import Speeds
from redbtc.telemetry import Telemetry
from redbtc.upstream.upstreams import NO_LIST, Upstream, choose

MODEL_NAME = re.compile(r"[A-Za-z0-9@~][\w.:@+~-]*(?:/[A-Za-z0-9@~][\w.:@+~-]*)*", re.ASCII)
NOT_FOUND = ("previous_response_id", "comparison_response_id")
NOTHING: Mapping[str, ObjectLocation] = {}
MAX_ASKED = 50  # requests for figures and pages, of an account or of a user, at once


class Gateway:
    """The running gateway: what its routes share, and the routes themselves."""

    def __init__(self, books: Billing, settings: Settings, watch: Telemetry) -> None:
        self.store = books.store
        self.books = books
        self.limits = Limiter()
        self.clocks = Deadlines()
        self.watch = watch
        self.watch.registry.register(self)
        self.vitals = Vitals(books.store)
        self.watch.registry.register(self.vitals)
        self.settings = settings
        self.upstreams = [Upstream(upstream) for upstream in settings.upstreams]
        self.objects = Objects(books.store)
        self.containers = Containers(books.store)
        self.unended = BackgroundResponses(self)
        self.speeds = Speeds(books.store)
        self.corrections = Corrections(books, self.objects, self.containers)
        self.sessions: Counter[str] = Counter()  # by account
        self.draining = self.stopping = False
        self.in_flight = 0
        self.running: set[MeteredRequest] = set()  # requests that have a row
        self.api = API(books, self, settings.dashboard_url)
        self._admin = self.in_time(served(self.api, actor_of(self.api)))
        self._pages = LazyDashboard(self.api)
        self._dashboard = self.in_time(self._pages)
        self._asking: defaultdict[str, asyncio.Semaphore] = defaultdict(asyncio.Semaphore)
        self._asked: Counter[str] = Counter()  # by account or user, requests without a place
        self._cutting: defaultdict[str, set[Callable[[], None]]] = defaultdict(set)  # by key
        self._started = time.monotonic()
        self._closing: set[asyncio.Task[None]] = set()

    def apply(self, settings: Settings) -> None:
        """New settings, from the next request on. Upstreams that are unchanged keep their
        connections; the others' end with their requests."""
        kept = {upstream.settings: upstream for upstream in self.upstreams}
        before = self.upstreams
        self.settings = settings
        self.books.settings = settings.billing
        self.books.noticed.set()  # there may be a webhook now
        self.upstreams = [
            kept.get(upstream) or Upstream(upstream) for upstream in settings.upstreams
        ]
        for upstream in before:
            if upstream not in self.upstreams:
                task = asyncio.create_task(upstream.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    def enter(self, scope: Scope) -> Key:
        """The key of a request that may come in. Raises Refusal."""
        if self.draining:
            raise Refusal("draining", headers=[(b"connection", b"close")])
        key = scope["key"] = authenticate(scope, self.store)
        if maintenance := self.books.maintenance():
            wait = (maintenance.until - self.store.time()) / 1000
            raise Refusal("maintenance", maintenance.text, retry_after=wait)
        return key

    @property
    def example_model(self) -> str:
        """The one that examples name."""
        return "redbtc-demo" if self.upstream_named(DEMO) else "gpt-5.4-mini"

    def serves(self, model: str) -> bool:
        """Whether an upstream is there for it."""
        return any(upstream.serves(model) for upstream in self.upstreams)

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""
        return {name for upstream in self.upstreams for name in upstream.listed}

    def offers_websocket(self) -> bool:
        """Whether any upstream does; else an upgrade is answered 426, by the route of its path."""
        return any(upstream.speaks_websocket for upstream in self.upstreams)

    def upstream_named(self, name: str) -> Upstream | None:
        """That of the settings."""
        return next((upstream for upstream in self.upstreams if upstream.name == name), None)

    def home_of(self, key: Key, object_id: str) -> ObjectLocation | None:
        """Where what the key's account made is stored; None for all else."""
        try:
            return self.objects.home_of(object_id, key.account_id)
        except StorageUnavailable:
            raise Refusal("ledger_unavailable") from None

    async def homes(
        self, key: Key, content: RequestBody, made: Mapping[str, ObjectLocation] = NOTHING
    ) -> set[str]:
        """The upstream that has what the request builds on, if it builds on anything; the content
        inherits the models and tools that work in that and its tokens, and drops its references, so
        that they take no memory while it waits for a place. `made`: what is the client's own
        without being stored. Raises Refusal."""
        if not content.references:
            return set()
        homes = await in_slices(self._find(key, content, made), key.account_id, begun=True)
        content.references = {}
        return homes

    def _find(
        self, key: Key, content: RequestBody, made: Mapping[str, ObjectLocation]
    ) -> Steps[set[str]]:
        # "" is nobody's. Long ids were never learned, and many of them would make a long query.
        asked = list({each.id for each in content.references if 0 < len(each.id) <= MAX_NAME})
        found: dict[str, ObjectLocation | None] = {}
        for at in range(0, len(asked), MAX_LOOK_UPS):
            found |= self._look_up(key, asked[at : at + MAX_LOOK_UPS])
            yield
        homes: set[str] = set()
        for number, (each, mentions) in enumerate(content.references.items()):
            home = found[each.id] if each.id in found else made.get(each.id)
            if home is None and each.name in NOT_FOUND and len(each.id) <= MAX_NAME:
                raise not_found(each.name, each.id)
            if home is None:
                raise not_own(each.name)
            homes.add(home.upstream)
            content.inherit(each, mentions, home, self.objects.growing(each.id))
            if number % 1000 == 0:
                yield
        if len(homes) > 1:
            message = "The referenced objects are stored at different upstreams."
            raise Refusal("invalid_request", message)
        return homes

    def _look_up(self, key: Key, ids: list[str]) -> dict[str, ObjectLocation | None]:
        try:
            return self.objects.look_up(ids, key.account_id)
        except StorageUnavailable:
            raise Refusal("ledger_unavailable") from None

    async def upstreams_for(
        self, key: Key, content: RequestBody, made: Mapping[str, ObjectLocation] = NOTHING
    ) -> list[Upstream]:
        """Those that may take the request, the first to try in front. `made`: as for `homes`.
        Raises Refusal."""
        homes = await self.homes(key, content, made)
        model = content.model
        for each in (model, *filter(None, content.further_models())):
            if not key.allows(each):
                message = f"This key may not use the model '{each}'."
                raise Refusal("model_not_allowed", message, param="model")
            if not self.books.served(each):
                message = f"The model '{each}' does not exist, or it is not served here."
                raise Refusal("model_not_found", message, param="model")
        if content.extras:
            self._check_rates(content)
        return choose(self.upstreams, model, *homes)

    def _check_rates(self, content: RequestBody) -> None:
        """Raise Refusal for a request that could use what its model's price has no rate for."""
        model, tier = content.facts.model or "", content.facts.service_tier
        for rate, member in content.needed_rates():
            if lacking := self.books.lacks(model, rate, tier):
                of_tier = "" if lacking.tier == DEFAULT_TIER else f" for the tier '{lacking.tier}'"
                message = (
                    f"The price of the model '{model}'{of_tier} has no rate '{rate}', so a request "
                    f"that {NEEDED[rate]} is refused."
                )
                raise Refusal("invalid_request", message, param=member)

    @contextlib.contextmanager
    def serving(self, scope: Scope | None, clock: Deadline, key: Key) -> Iterator[None]:
        """A request is in flight; its clock hears when its client leaves, or its key is cut."""
        leaving: set[Callable[[], None]] = scope["leaving"] if scope else set()

        def cut() -> None:
            clock.cut()
            if scope:
                scope["abort"]()

        self.in_flight += 1
        leaving.add(clock.leave)
        try:
            with self.cutting(key, cut):
                yield
        finally:
            leaving.discard(clock.leave)
            self.in_flight -= 1

    @contextlib.contextmanager
    def cutting(self, key: Key, cut: Callable[[], None]) -> Iterator[None]:
        """Meanwhile `cut` is called if the key is found to be somebody else's."""
        of_key = self._cutting[key.id]
        of_key.add(cut)
        try:
            yield
        finally:
            of_key.discard(cut)
            if not of_key:
                self._cutting.pop(key.id, None)

    # What the admin API is shown

    def cut(self, key_id: str) -> int:
        """End all that runs for a key, also at the upstreams; how much that was."""
        running = list(self._cutting.get(key_id, ()))
        in_background = self.unended.cancel(key_id)
        for cut in running:
            cut()
        return len(running) + in_background

    def set_back(self, at: int) -> None:
        """Let no background response have begun later than `at`: the ledger's time is set back."""
        self.unended.set_back(at)

    def stop(self) -> None:
        """End all that is in flight: the process is about to. What it used is estimated."""
        self.stopping = True
        for cut in [cut for running in self._cutting.values() for cut in running]:
            cut()

    def limits_of_key(self, key: Key) -> dict[str, Any]:
        """The limits in force for a key and its account, and what is left of them."""
        return self.limits.report(key, self.settings.limits)

    def limits_of_account(self, account: Account) -> dict[str, Any]:
        """Those of an account."""
        own = account.concurrency, account.requests_per_minute, account.tokens_per_minute
        factor = account.throttle_factor
        thousandths = None if factor is None else parse_amount(factor) // (NANOS // 1000)
        return self.limits.report_account(account.id, own, thousandths, self.settings.limits)

    def at_work(self) -> AtWork:
        """What is in flight, what was refused since the start, and the upstreams."""
        return AtWork(
            running=True,
            uptime_seconds=round(time.monotonic() - self._started),
            in_flight=self.in_flight,
            queued=self.limits.queued,
            refusals=self.watch.refusals(),
            upstreams=[
                UpstreamAtWork(name=each.name, usable=each.usable, in_flight=each.in_flight)
                for each in self.upstreams
            ],
        )

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for at each reading."""
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("redbtc_in_flight", "Requests under /v1 being served", self.in_flight)
        yield gauge("redbtc_queued", "Requests that wait for a place", self.limits.queued)
        yield counter("redbtc_ledger_commits", "Commits of the ledger", self.store.commits.count)
        yield counter(
            "redbtc_ledger_repairs",
            "Rows that another process had closed",
            self.store.commits.repaired,
        )
        yield gauge(
            "redbtc_clock_offset_seconds",
            "The machine's clock minus the ledger's time",
            self.store.clock.offset / 1000,
        )
        yield gauge("redbtc_ledger_healthy", "1 while the ledger can commit", self.store.healthy)

    def routes(self) -> list[Route]:
        """All that is served beside METERED. What is not here is 404 before its body is read."""
        return [
            ExactRoute("/v1/responses", AsApp(upgrade_required), methods=["GET"]),
            ExactRoute("/v1/responses/{id}", StoredRoute(self, "GET"), methods=["GET"]),
            ExactRoute("/v1/responses/{id}", StoredRoute(self, "DELETE"), methods=["DELETE"]),
            ExactRoute(
                "/v1/responses/{id}/cancel", StoredRoute(self, "POST", "/cancel"), methods=["POST"]
            ),
            ExactRoute(
                "/v1/responses/{id}/input_items",
                StoredRoute(self, "GET", "/input_items"),
                methods=["GET"],
            ),
            ExactRoute("/v1/models", AsApp(self.models), methods=["GET"]),
            ExactRoute("/v1/models/{model:path}", AsApp(self.model), methods=["GET"]),
            ExactRoute("/v1/{rest:path}", AsApp(self.preflight), methods=["OPTIONS"]),
            ExactRoute("/healthz", AsApp(self.healthz), methods=["GET"]),
            ExactRoute("/readyz", AsApp(self.readyz), methods=["GET"]),
            ExactRoute("/metrics", AsApp(self.metrics), methods=["GET"]),
            ExactRoute("/status", AsApp(self.status), methods=["GET"]),
            ExactRoute("/admin/v1/me{rest:path}", AsApp(self.me), methods=["GET"]),
            Route("/admin/v1/{rest:path}", AsApp(self.admin)),
            Route("/dashboard{rest:path}", AsApp(self.dashboard)),
        ]

    async def models(self, scope: Scope, _: Receive, send: Send) -> None:
        """The upstreams' lists joined, in their order, less what the key may not use and what has
        no price where that is refused. `age` is that of the oldest of the lists, where an upstream
        gave no new one."""
        scope["where"] = "/v1/models"
        key = self.enter(scope)
        clock, charged = Deadline(self.clocks), self.limits.charge(key, self.settings.limits)
        with charged as admission, self.serving(scope, clock, key):
            await self.limits.admit(admission, 0, clock)
            joined, age = await self._listed(key, self.upstreams)
        body = orjson.dumps({"object": "list", "data": list(joined.values())})
        await self._answer(scope, send, 200, body, age_header(age))

    async def _listed(
        self, key: Key, upstreams: Iterable[Upstream]
    ) -> tuple[dict[str, dict[str, Any]], float]:
        """The models that the key may use, and the oldest list's age in seconds. Raises Refusal
        where no upstream ever gave a list."""
        usable = [upstream for upstream in upstreams if upstream.usable]
        if not usable:
            raise Refusal("no_upstream", retry_after=5)
        asked = (upstream.models() for upstream in usable)
        lists = await asyncio.gather(*asked, return_exceptions=True)
        joined: dict[str, dict[str, Any]] = {}
        oldest, failures = 0.0, []
        for found in lists:
            if isinstance(found, BaseException):
                failures.append(found)
                continue
            oldest = max(oldest, found[1])
            async for model in with_turns(found[0]):
                if self.books.served(model["id"]) and key.allows(model["id"]):
                    joined.setdefault(model["id"], model)
        if len(failures) == len(lists):
            raise failures[0]
        return joined, oldest

    async def model(self, scope: Scope, _: Receive, send: Send) -> None:
        """One model, as the upstream that would serve it describes it; as it was listed last, where
        that one does not answer."""
        scope["where"] = "/v1/models/{id}"
        key = self.enter(scope)
        clock, charged = Deadline(self.clocks), self.limits.charge(key, self.settings.limits)
        with charged as admission, self.serving(scope, clock, key):
            name = scope["path_params"]["model"]
            status, body, headers = await self._shown(key, name, admission, clock)
        await self._answer(scope, send, status, body, headers)

    async def _shown(
        self, key: Key, name: str, admission: Admission, clock: Deadline
    ) -> tuple[int, bytes, Headers]:
        # '../files' must not reach the upstream. To match a long name takes long.
        is_name = len(name) <= MAX_NAME and MODEL_NAME.fullmatch(name)
        if not (is_name and self.books.served(name) and key.allows(name)):
            raise Refusal("model_not_found", param="model")
        upstream = choose(self.upstreams, name)[0]
        await self.limits.admit(admission, 0, clock)
        shown, status = b"", 0
        with contextlib.suppress(*NO_LIST):
            status, shown = await upstream.fetch_whole(f"/models/{name}")
        if 200 <= status < 500:
            return status, shown, []
        listed, age = await self._listed(key, [upstream])
        if name not in listed:
            raise Refusal("upstream_unreachable")
        return 200, orjson.dumps(listed[name]), age_header(age)

    def allows_origin(self, origin: bytes) -> bool:
        """Return whether pages of that origin may use /v1."""
        return bool(cors_headers(origin, self.settings.server.cors_origins))

    async def preflight(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer a CORS preflight, which browsers send without a key."""
        origin = header(scope["headers"], b"origin")
        if origin is None or not self.allows_origin(origin):
            raise Refusal("unknown_url")
        headers = [*preflight_headers(scope["headers"]), *ids_of(scope)]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def healthz(self, scope: Scope, _: Receive, send: Send) -> None:
        """The process lives: no key, no database."""
        scope["where"] = "/healthz"
        await respond(scope, send, 200, b'{"status":"ok"}')

    async def readyz(self, scope: Scope, _: Receive, send: Send) -> None:
        """Whether a request would be served."""
        scope["where"] = "/readyz"
        if self.draining:
            raise Refusal("draining")
        if not any(upstream.usable for upstream in self.upstreams):
            raise Refusal("no_upstream", retry_after=5)
        if not await self.store.can_commit():
            raise Refusal("ledger_unavailable")
        await respond(scope, send, 200, b'{"status":"ready"}')

    async def me(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What an account asks of itself costs none of its limits; its answers are made in turn."""
        scope["where"] = "/admin/v1/me"
        key = scope["key"] = authenticate(scope, self.store)
        with self._asked_by(key.account_id):
            async with self._asking[key.account_id]:
                await self._admin(scope, receive, self._with_ids(scope, send))

    @contextlib.contextmanager
    def _asked_by(self, who: str) -> Iterator[None]:
        """Count a request of an account or a user that has no place: what waits for a client that
        reads its answer slowly holds a connection and memory. Raises Refusal."""
        if self._asked[who] >= MAX_ASKED:
            message = f"At most {MAX_ASKED} of these requests can be in flight at once."
            raise Refusal("concurrency_limit_exceeded", message)
        self._asked[who] += 1
        try:
            yield
        finally:
            self._asked[who] -= 1
            if not self._asked[who]:
                del self._asked[who]

    def _asked_in_session(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """Count a request of whoever is logged in. Raises Refusal."""
        with contextlib.suppress(StorageUnavailable):
            if session := session_of(self.api, Request(scope)):
                return self._asked_by(session.user_id)
        return contextlib.nullcontext()

    def in_time(self, app: App) -> App:
        """Return the app with a time limit for each request's body: to the app, a client that is
        slower has disconnected."""

        async def app_in_time(scope: Scope, receive: Receive, send: Send) -> None:
            until = time.monotonic() + self.settings.server.body_timeout_seconds
            await app(scope, received_until(until, receive), send)

        return app_in_time

    def _with_ids(self, scope: Scope, send: Send) -> Send:
        async def send_with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ids_of(scope)]
                if message["status"] != 500:  # it is counted as what failed
                    self.watch.answered(scope, message["status"])
            await send(message)

        return send_with_ids

    async def admin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The admin API, for whoever is logged in to the dashboard."""
        scope["where"] = "/admin/v1"
        with self._asked_in_session(scope):
            await self._admin(scope, receive, self._with_ids(scope, send))

    async def dashboard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Its pages."""
        scope["where"] = "/dashboard"
        with self._asked_in_session(scope):
            await self._dashboard(scope, receive, self._with_ids(scope, send))

    async def status(self, scope: Scope, _: Receive, send: Send) -> None:
        """For everybody: whether it works, and the notices for all that are in force or coming."""
        scope["where"] = "/status"
        uptime = round(time.monotonic() - self._started)
        try:
            status = await status_module.status(self.books, uptime)
        except sqlite3.Error:
            raise Refusal("ledger_unavailable") from None
        accept = header(scope["headers"], b"accept") or b""
        if prefers_html(accept.decode("latin-1")):
            page = await self._pages.page("status.html", asdict(status))
            headers = [(name.encode(), value.encode()) for name, value in SECURITY.items()]
            content_type = page.headers["content-type"].encode()
            await respond(scope, send, page.status_code, bytes(page.body), headers, content_type)
        else:
            await respond(scope, send, 200, msgspec.json.encode(status))

    async def metrics(self, scope: Scope, _: Receive, send: Send) -> None:
        """Prometheus text, for loopback or for who has the token of the settings."""
        scope["where"] = "/metrics"
        if not self._may_read_metrics(scope):
            raise Refusal("metrics_forbidden")
        body = prometheus_client.generate_latest(self.watch.registry)
        content_type = prometheus_client.CONTENT_TYPE_LATEST.encode()
        await respond(scope, send, 200, body, content_type=content_type)

    def _may_read_metrics(self, scope: Scope) -> bool:
        variable = self.settings.metrics.token_env
        if variable:
            expected = f"Bearer {os.environ.get(variable, '')}".encode()
            shown = header(scope["headers"], b"authorization") or b""
            return len(expected) > 7 and hmac.compare_digest(expected, shown)
        try:
            return ipaddress.ip_address(scope["client"][0]).is_loopback
        except (TypeError, ValueError):
            return False

    async def _answer(
        self, scope: Scope, send: Send, status: int, body: bytes, headers: Headers
    ) -> None:
        self.watch.answered(scope, status)
        await respond(scope, send, status, body, headers)


DEMO = "demo"  # the name of its upstream
