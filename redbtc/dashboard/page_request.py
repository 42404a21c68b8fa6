"""A logged-in user's request for a page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Concatenate
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from redbtc.admin.actors import Actor
from redbtc.admin.api import API, Arguments
from redbtc.admin.http import check_fields
from redbtc.admin.operations import Given, Result
from redbtc.admin.users import LoginSession
from redbtc.dashboard.forms import read_form
from redbtc.dashboard.sessions import PAGE_HEADERS, SAFE, actor_for, check_origin, session_of

HOME = "/dashboard/"
LOGIN = "/dashboard/login"
ACCEPT = "/dashboard/accept"  # where an owner accepts new documents


class PageRequest:
    """A logged-in user's request to the dashboard."""

    def __init__(
        self, api: API, request: Request, session: LoginSession, form: Mapping[str, str]
    ) -> None:
        self._api = api
        self.request = request
        self.query = request.query_params
        self.path = request.path_params
        self.actor = actor_for(session, request)
        self.session = session
        self.form = form

    async def ask(
        self,
        operation: Callable[Concatenate[API, Actor, Arguments], Awaitable[Result]],
        *arguments: Arguments.args,
        **path: Arguments.kwargs,
    ) -> Result:
        """Return the result of an operation. Raises UserError."""
        return await self._api.perform(operation, self.actor, *arguments, **path)

    async def do(
        self,
        operation: Callable[Concatenate[API, Actor, Given, Arguments], Awaitable[Result]],
        values: Mapping[str, Any],
        *arguments: Arguments.args,
        **path: Arguments.kwargs,
    ) -> Result:
        """Return the result of an operation whose input is the values of a form or a query, as
        text. Raises UserError."""
        return await self._api.perform_text(operation, self.actor, values, *arguments, **path)

    @property
    def now(self) -> int:
        """The ledger's time, in milliseconds."""
        return self._api.billing.store.time()

    async def example_model(self, patterns: Sequence[str] | None) -> str:
        """Return a model for code samples of a key that is limited to these patterns."""
        return await self._api.example_model(patterns)

    async def codex_config(self, patterns: Sequence[str] | None, base_url: str) -> str:
        """Return Codex CLI's configuration for a key that is limited to these patterns."""
        return (await self._api.codex_config_for(patterns, base_url)).config

    def is_logged_in(self) -> bool:
        """Return whether the session is still valid. Raises StorageUnavailable."""
        return session_of(self._api, self.request) is not None

    def fields(self, *names: str) -> dict[str, str]:
        """Return the fields of the form with these names that were filled in, without the spaces
        around their values."""
        values = {name: self.form.get(name, "").strip() for name in names}
        return {name: value for name, value in values.items() if value}


PageHandler = Callable[[PageRequest], Awaitable[Response]]


def logged_in(
    api: API, handler: PageHandler, *, before_acceptance: bool = False
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that requires a login, and of an owner the acceptance of new documents
    unless `before_acceptance`. It redirects other users to the page for that."""

    async def endpoint(request: Request) -> Response:
        session, form = session_of(api, request), {}
        check_fields(request.scope["query_string"])
        if session and request.method not in SAFE:
            check_origin(request)
            form = await read_form(request)
            session = session_of(api, request)  # it may have ended while the form was read
        if session is None:
            return redirect_with_next(LOGIN, request)
        page = PageRequest(api, request, session, form)
        if not before_acceptance and api.to_accept(page.actor):
            if request.method not in SAFE:
                api.require_acceptance(page.actor)
            return redirect_with_next(ACCEPT, request)
        return await handler(page)

    return endpoint


def redirect(path: str) -> Response:
    """Return a response that sends the browser to a path."""
    return RedirectResponse(path, 303, PAGE_HEADERS)


def redirect_with_next(target: str, request: Request) -> Response:
    """Return a response that sends the browser to the form at `target`, and from there back to the
    page that was requested."""
    path, query = request.url.path, request.url.query
    if request.method not in SAFE or path in ("/dashboard", HOME):
        return redirect(target)
    return redirect(f"{target}?{urlencode({'next': f'{path}?{query}' if query else path})}")


def redirect_to_next(request: Request) -> Response:
    """Return a response that sends the browser from a form to the page that was requested first."""
    wanted = request.query_params.get("next", "")
    return redirect(wanted if wanted.startswith("/dashboard/") else HOME)
