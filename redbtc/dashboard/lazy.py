"""The dashboard, loaded when its first page is asked for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from redbtc.admin.api import API

if TYPE_CHECKING:
    from redbtc.dashboard.app import Dashboard


class LazyDashboard:
    """The dashboard as an ASGI app. To load it takes 50 ms, and many gateways never show a page, so
    that is done at the first request for one, in a thread."""

    def __init__(self, api: API) -> None:
        self._api = api
        self._loading: asyncio.Task[tuple[Dashboard, Starlette]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, app = await self._loaded()
        await app(scope, receive, send)

    async def page(self, template: str, context: Any) -> Response:
        """Draw one page for somebody who need not be logged in."""
        dashboard, _ = await self._loaded()
        return await dashboard.page(template, context)

    async def _loaded(self) -> tuple[Dashboard, Starlette]:
        if self._loading is None:
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        try:
            return await asyncio.shield(self._loading)
        except Exception:  # no descriptors, no memory: the next request tries again
            self._loading = None
            raise

    def _load(self) -> tuple[Dashboard, Starlette]:
        from redbtc.dashboard.app import Dashboard

        dashboard = Dashboard(self._api)
        return dashboard, dashboard.app()
