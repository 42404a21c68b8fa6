"""The admin API and the dashboard on the public port."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

from starlette.requests import Request

from redbtc.admin.api import API
from redbtc.admin.http import admin_app
from redbtc.dashboard.lazy import LazyDashboard
from redbtc.dashboard.sessions import authenticator, session_of
from redbtc.errors import StorageUnavailable
from redbtc.gateway.authentication import key_of_request
from redbtc.gateway.gateway import Gateway
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, ClientRequest, Message, Receive, Scope, Send, ids_of, request_of

MAX_ASKED = 50  # requests for figures and pages, of an account or of a user, at once


class AdminRoutes:
    """The routes of the admin API and of the dashboard on the public port, for accounts with an API
    key and for users who are logged in."""

    def __init__(self, gateway: Gateway, api: API) -> None:
        self._gateway = gateway
        self._api = api
        self._admin = in_time(gateway, admin_app(api, authenticator(api), abort))
        self.lazy_dashboard = LazyDashboard(api)
        self._dashboard = in_time(gateway, self.lazy_dashboard)
        self._asking: defaultdict[str, asyncio.Semaphore] = defaultdict(asyncio.Semaphore)
        self._asked: Counter[str] = Counter()  # by account or user, requests without a place

    async def me(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what an account asks about itself. That costs none of its limits; the answers to an
        account are made one after the other. Raises Refusal."""
        request = request_of(scope)
        request.route = "/admin/v1/me"
        gateway = self._gateway
        key = key_of_request(request, gateway.store, gateway.key_headers)
        with self._asked_by(key.account_id):
            async with self._asking[key.account_id]:
                await self._admin(scope, receive, self._with_ids(request, send))

    async def admin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the admin API to a user who is logged in to the dashboard."""
        request = request_of(scope)
        request.route = "/admin/v1"
        with self._asked_in_session(scope):
            await self._admin(scope, receive, self._with_ids(request, send))

    async def dashboard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the pages of the dashboard."""
        request = request_of(scope)
        request.route = "/dashboard"
        with self._asked_in_session(scope):
            await self._dashboard(scope, receive, self._with_ids(request, send))

    @contextlib.contextmanager
    def _asked_by(self, who: str) -> Iterator[None]:
        """Count a request of an account or a user that has no place: one whose client reads its
        answer slowly holds a connection and memory. Raises Refusal."""
        if self._asked[who] >= MAX_ASKED:
            message = f"At most {MAX_ASKED} requests for figures and pages can be in flight."
            raise Refusal("concurrency_limit_exceeded", message)
        self._asked[who] += 1
        self._gateway.operations += 1
        try:
            yield
        finally:
            self._gateway.operations -= 1
            self._asked[who] -= 1
            if not self._asked[who]:
                del self._asked[who]

    def _asked_in_session(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """Count a request of a user who is logged in. Raises Refusal."""
        with contextlib.suppress(StorageUnavailable):
            if session := session_of(self._api, Request(scope)):
                return self._asked_by(session.user_id)
        return contextlib.nullcontext()

    def _with_ids(self, request: ClientRequest, send: Send) -> Send:
        """Return a `send` that adds the request's ids to the answer, and counts it."""

        async def send_with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ids_of(request)]
                if message["status"] != 500:  # the guard counts it as failed
                    self._gateway.telemetry.answered(request.id, request.route, message["status"])
            await send(message)

        return send_with_ids


def abort(request: Request) -> None:
    """End the connection of a request without the end of its answer."""
    request_of(request.scope).client.abort()


def in_time(gateway: Gateway, app: App) -> App:
    """Return the app with a time limit for the body of each request: to the app, a client that is
    slower has disconnected."""

    async def app_in_time(scope: Scope, receive: Receive, send: Send) -> None:
        deadline = time.monotonic() + gateway.settings.server.body_timeout_seconds
        await app(scope, received_until(deadline, receive), send)

    return app_in_time


def finished_at_end(gateway: Gateway, app: App) -> App:
    """Return the app, whose requests are to be finished before the process ends."""

    async def counted_app(scope: Scope, receive: Receive, send: Send) -> None:
        gateway.operations += 1
        try:
            await app(scope, receive, send)
        finally:
            gateway.operations -= 1

    return counted_app


def received_until(deadline: float, receive: Receive) -> Receive:
    """Return a `receive` that says the client has disconnected if its body is not whole at
    `deadline`, a time of the monotonic clock."""
    whole = False

    async def receive_until() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = not message.get("more_body", False)
        return message

    return receive_until
