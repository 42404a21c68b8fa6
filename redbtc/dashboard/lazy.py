"""The dashboard, loaded when its first page is requested."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from redbtc.admin.api import API


class LoadedDashboard(NamedTuple):
    """The dashboard as an ASGI app, and functions that return public pages."""

    app: ASGIApp
    render: Callable[[str, dict[str, Any]], Awaitable[Response]]
    document: Callable[[str, str | None], Awaitable[Response | None]]


class LazyDashboard:
    """The dashboard as an ASGI app. Loading it takes 50 ms, and many gateways never show a page, so
    it is loaded in a thread at the first request for one."""

    def __init__(self, api: API) -> None:
        self._api = api
        self._loading: asyncio.Task[LoadedDashboard] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        dashboard = await self._loaded()
        await dashboard.app(scope, receive, send)

    async def render(self, template: str, variables: dict[str, Any]) -> Response:
        """Return a page for anyone, logged in or not."""
        dashboard = await self._loaded()
        return await dashboard.render(template, variables)

    async def document(self, name: str, version: str | None) -> Response | None:
        """Return the page of a document, of the version in force or of another one. Return None if
        that does not exist."""
        dashboard = await self._loaded()
        return await dashboard.document(name, version)

    async def _loaded(self) -> LoadedDashboard:
        if self._loading is None:
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        try:
            return await asyncio.shield(self._loading)
        except Exception:  # no descriptors, no memory: the next request tries again
            self._loading = None
            raise

    def _load(self) -> LoadedDashboard:
        from redbtc.dashboard.app import Dashboard

        dashboard = Dashboard(self._api)
        return LoadedDashboard(dashboard.app(), dashboard.render, dashboard.documents.show)
