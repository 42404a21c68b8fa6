"""Logging in and out, one-time links, and passwords."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from redbtc.admin.actors import Forbidden
from redbtc.admin.passwords import Later
from redbtc.admin.users import Users
from redbtc.dashboard.forms import read_form
from redbtc.dashboard.page_request import LOGIN, PageRequest, redirect, redirect_to_next
from redbtc.dashboard.rendering import PageVariables, Renderer
from redbtc.dashboard.sessions import (
    SAFE,
    check_origin,
    network_of,
    session_cookie,
    set_session_cookie,
)
from redbtc.errors import UserError

WRONG_LOGIN = "Wrong email or password."
SUSPENDED = "This account is suspended."
SEVERAL = "You have several logins with this password. Choose one and enter the password again."


class LoginPages:
    """The pages on which a session begins, ends, or gets another password."""

    def __init__(self, users: Users, renderer: Renderer) -> None:
        self._users = users
        self._renderer = renderer

    async def log_in(self, request: Request) -> Response:
        """Show the login form, or log in. If the same email address and password belong to several
        logins, ask which one is meant."""
        shown: PageVariables = {"email": "", "logins": []}
        if request.method in SAFE:
            return await self._renderer.render("login.html", shown)
        check_origin(request)
        form = await read_form(request)
        shown["email"] = email = form.get("email", "")[:254]
        network, password = network_of(request), form.get("password", "")
        try:
            found = await self._users.verify(email, password, network)
        except Later as error:
            return await self._renderer.render_error("login.html", error, shown)
        chosen = form.get("login", "")
        found = [each for each in found if chosen in ("", each.user_id)]
        active = [each for each in found if each.active]
        if len(active) > 1:
            shown |= {"logins": active, "problem": SEVERAL}
            return await self._renderer.render("login.html", shown)
        for each in active:
            if response := await self._begin_session(request, each.user_id, each.hashed):
                return response
        shown["problem"] = SUSPENDED if found and not active else WRONG_LOGIN
        return await self._renderer.render("login.html", shown, 403)

    async def _begin_session(
        self, request: Request, user_id: str, hashed: bytes
    ) -> Response | None:
        """Begin a session and redirect to the page that was requested. Return None if the password
        has changed meanwhile or the account is suspended."""
        browser, former = request.headers.get("user-agent", ""), session_cookie(request)
        cookie = await self._users.log_in(user_id, hashed, browser, former)
        if cookie is None:
            return None
        response = redirect_to_next(request)
        set_session_cookie(request, response, cookie)
        return response

    async def log_out(self, page: PageRequest) -> Response:
        """End this session and show the login form."""
        await self._users.end_session(page.session.id, page.session.user_id)
        response = redirect(LOGIN)
        set_session_cookie(page.request, response, "")
        return response

    async def follow_link(self, request: Request) -> Response:
        """Show the page of a one-time link, or set a password, which uses the link up."""
        link = self._users.link(request.path_params["link"])
        shown: PageVariables = {"email": link.email if link else ""}
        if not link or request.method in SAFE:
            return await self._renderer.render("link.html", shown, 200 if link else 404)
        check_origin(request)
        form = await read_form(request)
        try:
            password = new_password(form, "password")
            hashed = await self._users.set_password(link, password, network_of(request))
        except UserError as error:
            return await self._renderer.render_error("link.html", error, shown)
        response = await self._begin_session(request, link.user_id, hashed)
        if response is None:
            raise Forbidden("your password is set, but this account is suspended")
        return response

    async def change_password(self, page: PageRequest) -> Response:
        """Set a new password, which ends all sessions, and log this browser in again. Raises
        UserError."""
        old, new = page.form.get("old_password", ""), new_password(page.form, "new_password")
        network = page.actor.network
        hashed = await self._users.change_password(page.session, old, new, network)
        user_id = page.session.user_id
        return await self._begin_session(page.request, user_id, hashed) or redirect(LOGIN)


def new_password(form: Mapping[str, str], name: str) -> str:
    """Return the new password of a form. Raises UserError if the two fields differ."""
    if form.get(name, "") != form.get("again", ""):
        raise UserError("the two passwords don't match")
    return form.get(name, "")
