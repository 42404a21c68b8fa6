"""The request for a page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from redbtc.admin.actors import Actor
from redbtc.admin.api import API, Answer, Arguments, Given
from redbtc.admin.users import LoginSession
from redbtc.dashboard.sessions import SAFE, SECURITY, actor_for, session_of

if TYPE_CHECKING:
    from redbtc.dashboard.app import Dashboard


HOME = "/dashboard/"
LOGIN = "/dashboard/login"


def to(path: str) -> Response:
    """What a browser is to ask for next."""
    return RedirectResponse(path, 303, SECURITY)


def to_login(request: Request) -> Response:
    """And from there to where it was going."""
    path, query = request.url.path, request.url.query
    if request.method not in SAFE or path in ("/dashboard", HOME):
        return to(LOGIN)
    return to(f"{LOGIN}?{urlencode({'next': f'{path}?{query}' if query else path})}")


class PageRequest:
    """A request to the dashboard of somebody who is logged in."""

    def __init__(
        self, dashboard: Dashboard, request: Request, session: LoginSession, form: dict[str, str]
    ) -> None:
        self.request = request
        self.actor = actor_for(session, request)
        self.session = session
        self.form = form
        self._dashboard = dashboard

    async def ask(
        self,
        operation: Callable[Concatenate[API, Actor, Arguments], Awaitable[Answer]],
        *arguments: Arguments.args,
        **path: Arguments.kwargs,
    ) -> Answer:
        """Perform an operation of the admin API. Raise UserError."""
        return await self._dashboard.api.perform(operation, self.actor, *arguments, **path)

    async def do(
        self,
        operation: Callable[Concatenate[API, Actor, Given, Arguments], Awaitable[Answer]],
        values: Mapping[str, Any],
        *arguments: Arguments.args,
        **path: Arguments.kwargs,
    ) -> Answer:
        """Perform an operation with the text values of a form or a query. Raise UserError."""
        return await self._dashboard.api.perform_text(
            operation, self.actor, values, *arguments, **path
        )

    @property
    def now(self) -> int:
        """The ledger's time, in milliseconds."""
        return self._dashboard.api.billing.store.time()

    async def example_model(self, patterns: Sequence[str] | None) -> str:
        """As the API has it."""
        return await self._dashboard.api.example_model(patterns)

    def is_logged_in(self) -> bool:
        """Still. Raises UserError."""
        return session_of(self._dashboard.api, self.request) is not None

    def fields(self, *names: str) -> dict[str, str]:
        """Those of the form that were filled in."""
        filled_in = {name: self.form.get(name, "").strip() for name in names}
        return {name: text for name, text in filled_in.items() if text}


PageVariables = dict[str, Any]
