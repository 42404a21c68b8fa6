"""The dashboard's routes, forms and login."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from redbtc.admin.actors import RANKS, Forbidden, Rank
from redbtc.admin.api import API
from redbtc.admin.http import OTHERWISE, STATUS, check_fields, retry_after, whole_body
from redbtc.admin.operations import Operation
from redbtc.admin.passwords import Later
from redbtc.admin.users import LoginSession
from redbtc.dashboard.account_pages import (
    account_notices,
    account_overview,
    add_key,
    billing,
    keys,
    manage,
    members,
    revoke_key,
    rotate_key,
    set_account,
    statement,
    statement_csv,
    usage,
    usage_csv,
)
from redbtc.dashboard.operator_pages import (
    accounts,
    add_account,
    add_notice,
    add_price,
    add_user,
    end_notice,
    end_session,
    log,
    notices,
    overview,
    prices,
    remove_user,
    reset_user,
    users,
    you,
)
from redbtc.dashboard.rendering import HERE, PAGE, draw, environment, explanation
from redbtc.dashboard.sessions import (
    SAFE,
    SECURITY,
    check_origin,
    network_of,
    session_cookie,
    session_of,
    set_session_cookie,
)
from redbtc.dashboard.visit import HOME, LOGIN, PageRequest, PageVariables, to, to_login
from redbtc.errors import NotFound, UserError

MAX_FORM_BYTES = 64 << 10
ONCE = re.compile("[0-9a-f]{16}")
MAX_SENT = 10_000  # forms that are known to have been sent

BAD_LOGIN = "Wrong email or password."
SUSPENDED = "This account is suspended."
SEVERAL = "You have several logins with this password. Choose one and enter the password again."
UNKNOWN = {404: "Page not found.", 500: "The gateway could not process this request."}
Handler = Callable[[PageRequest], Awaitable[Response]]
Show = Callable[[PageRequest], Awaitable[PageVariables]]
Action = Callable[[PageRequest], Awaitable[PageVariables | Response | None]]
NO_ACTIONS: Mapping[str, Action] = {}


class Dashboard:
    """All pages. `api`: what they show and do."""

    def __init__(self, api: API) -> None:
        self.api = api
        self._templates = environment()
        self._drawn: set[str] = set()
        self._drawing = asyncio.Lock()
        self._sent: OrderedDict[tuple[str, str], None] = OrderedDict()

    def app(self) -> Starlette:
        """As an app."""
        account, screen = "/dashboard/accounts/{account}", self._screen
        routes = [
            Route("/dashboard/style.css", self._asset("style.css", "text/css")),
            Route("/dashboard/dashboard.js", self._asset("dashboard.js", "text/javascript")),
            Route(LOGIN, self.login, methods=["GET", "POST"]),
            Route("/dashboard/link/{link}", self.link, methods=["GET", "POST"]),
            Route("/dashboard/logout", self.logged_in(self.log_out), methods=["POST"]),
            Route("/dashboard", self.logged_in(self.home)),
            Route("/dashboard/", self.logged_in(self.home)),
            screen("/dashboard/overview", overview),
            screen("/dashboard/accounts", accounts, {"add": add_account}),
            screen("/dashboard/prices", prices, {"add": add_price}),
            screen("/dashboard/notices", notices, {"add": add_notice, "end": end_notice}),
            screen("/dashboard/log", log),
            screen("/dashboard/users", users, USER_ACTIONS, "operator"),
            screen("/dashboard/you", you, {"end": end_session, "password": self.change_password}),
            screen(account, account_overview),
            screen(f"{account}/keys", keys, KEY_ACTIONS),
            screen(f"{account}/usage", usage),
            Route(f"{account}/usage.csv", self.logged_in(usage_csv)),
            screen(f"{account}/billing", billing),
            screen(f"{account}/billing/{{month}}", statement),
            Route(f"{account}/billing/{{month}}/csv", self.logged_in(statement_csv)),
            screen(f"{account}/members", members, USER_ACTIONS, "owner"),
            screen(f"{account}/notices", account_notices),
            screen(f"{account}/manage", manage, MANAGE_ACTIONS, "operator"),
        ]
        handlers: dict[Any, Any] = {
            UserError: self._refused,
            HTTPException: self._unknown,
            Exception: self._unknown,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    def _screen(
        self,
        path: str,
        show: Show,
        actions: Mapping[str, Action] = NO_ACTIONS,
        least: Rank = "viewer",
    ) -> Route:
        """The page that `show` gives the context of, for this role or a higher one, and the forms
        on it: which one was sent is told by its field `do`. What an action returns is shown at
        once, and only then; otherwise the page is loaded again."""
        template = f"{show.__name__}.html"

        async def handler(visit: PageRequest) -> Response:
            if RANKS[visit.actor.rank] < RANKS[least]:
                raise Forbidden("you don't have access to this page")
            made: PageVariables = {"done": "done" in visit.request.query_params}
            refused = None
            if visit.request.method not in SAFE:
                try:
                    answer = await self._act(visit, actions)
                except (NotFound, Forbidden):
                    raise
                except UserError as error:
                    made, refused = {"form": visit.form}, error
                else:
                    if not isinstance(answer, dict):
                        page = visit.request.query_params.get("page", "")
                        return answer or to(
                            f"?page={page}&done" if PAGE.fullmatch(page) else "?done"
                        )
                    made = answer
            context = {**await show(visit), "session": visit.session, **made}
            return await self.page(template, context, refused=refused)

        methods = ["GET", "POST"] if actions else ["GET"]
        return Route(path, self.logged_in(handler), methods=methods)

    async def _act(
        self, visit: PageRequest, actions: Mapping[str, Action]
    ) -> PageVariables | Response | None:
        action = actions.get(visit.form.get("do", ""))
        if action is None:
            raise Forbidden("this page has no such form; reload the page and try again")
        with self._once(visit.session, visit.form.pop("once", "")):
            return await action(visit)

    @contextlib.contextmanager
    def _once(self, session: LoginSession, token: str) -> Iterator[None]:
        """What a form on a page asks for is done once, however often it is sent (a page is loaded
        again, a button clicked twice), as long as the gateway runs. Raises UserError."""
        if not ONCE.fullmatch(token):  # of no page of ours
            yield
            return
        form = session.user_id, token
        if form in self._sent:
            raise UserError("this form was already submitted; keys and links are shown only once")
        self._sent[form] = None
        if len(self._sent) > MAX_SENT:
            self._sent.popitem(last=False)
        try:
            yield
        except BaseException:
            self._sent.pop(form, None)
            raise

    async def home(self, visit: PageRequest) -> Response:
        """Where one begins."""
        account_id = visit.session.account_id
        return to(f"/dashboard/accounts/{account_id}" if account_id else "/dashboard/overview")

    @staticmethod
    def _asset(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        content = (HERE / "static" / name).read_bytes()
        headers = {**SECURITY, "cache-control": "public, max-age=300"}

        async def asset(_: Request) -> Response:
            return Response(content, headers=headers, media_type=kind)

        return asset

    async def page(
        self, name: str, context: PageVariables, status: int = 200, refused: UserError | None = None
    ) -> Response:
        """A template as an answer; with `refused` it says why."""
        if refused:
            status = STATUS.get(type(refused), OTHERWISE)
            context = {**context, **explanation(refused)}
        usual: PageVariables = {
            "session": None,
            "form": {},
            "wrong": "",
            "problem": "",
            "done": False,
            "here": "",
        }
        usual["currency"] = self.api.books.currency
        async with self._drawing:
            if name not in self._drawn:  # compiling takes longer, but is done once
                await asyncio.to_thread(self._templates.get_template, name)
                self._drawn.add(name)
            body = await draw(self._templates.get_template(name), {**usual, **context})
        headers = {**SECURITY, **(retry_after(refused) if refused else {})}
        return Response(body, status, headers, media_type="text/html; charset=utf-8")

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, UserError), "it handles no other"
        code = STATUS.get(type(error), OTHERWISE)
        return await self.page("error.html", {"code": code}, refused=error)

    async def _unknown(self, _: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        problem = UNKNOWN.get(status, "This request isn't supported.")
        return await self.page("error.html", {"code": status, "problem": problem}, status)

    @staticmethod
    async def _form(request: Request) -> dict[str, str]:
        """What was filled in. Raises UserError."""
        check_fields(request.scope["query_string"])
        body = await whole_body(request, MAX_FORM_BYTES)
        check_fields(body)
        return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))

    def logged_in(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint for people who are logged in. It redirects others to the login."""

        async def endpoint(request: Request) -> Response:
            session, form = session_of(self.api, request), {}
            check_fields(request.scope["query_string"])
            if session and request.method not in SAFE:
                check_origin(request)
                form = await self._form(request)
                session = session_of(self.api, request)  # it may have ended meanwhile
            if session is None:
                return to_login(request)
            return await handler(PageRequest(self, request, session, form))

        return endpoint

    # Logging in

    async def login(self, request: Request) -> Response:
        """Show the login form, or log in. Somebody with several logins that have one password is
        asked which they mean."""
        shown: PageVariables = {"email": "", "logins": []}
        if request.method in SAFE:
            return await self.page("login.html", shown)
        check_origin(request)
        form = await self._form(request)
        shown["email"] = email = form.get("email", "")[:254]
        network, password = network_of(request), form.get("password", "")
        try:
            found = await self.api.users.verify(email, password, network)
        except Later as error:
            return await self.page("login.html", shown, refused=error)
        chosen = form.get("login", "")
        found = [each for each in found if chosen in ("", each.user_id)]
        active = [each for each in found if each.active]
        if len(active) > 1:
            return await self.page("login.html", {**shown, "logins": active, "problem": SEVERAL})
        for each in active:
            if logged_in := await self._log_in(request, each.user_id, each.hashed):
                return logged_in
        shown["problem"] = SUSPENDED if found and not active else BAD_LOGIN
        return await self.page("login.html", shown, 403)

    async def _log_in(self, request: Request, user_id: str, hashed: bytes) -> Response | None:
        """Begin a session and redirect to the page that was asked for. Return None if the password
        has changed meanwhile or the account is suspended."""
        browser, former = request.headers.get("user-agent", ""), session_cookie(request)
        cookie = await self.api.users.log_in(user_id, hashed, browser, former)
        if cookie is None:
            return None
        wanted = request.query_params.get("next", "")
        path = wanted if wanted.startswith("/dashboard/") else HOME
        response = RedirectResponse(path, 303, SECURITY)
        set_session_cookie(request, response, cookie)
        return response

    async def log_out(self, visit: PageRequest) -> Response:
        """End this session."""
        await self.api.users.end_session(visit.session.id, visit.session.user_id)
        response = to(LOGIN)
        set_session_cookie(visit.request, response, "")
        return response

    async def link(self, request: Request) -> Response:
        """Show the page of a one-time link, or set a password, which uses the link up."""
        link = self.api.users.link(request.path_params["link"])
        shown: PageVariables = {"email": link.email if link else ""}
        if not link or request.method in SAFE:
            return await self.page("link.html", shown, 200 if link else 404)
        check_origin(request)
        form = await self._form(request)
        try:
            password = new_password(form, "password")
            hashed = await self.api.users.set_password(link, password, network_of(request))
        except UserError as error:
            return await self.page("link.html", shown, refused=error)
        logged_in = await self._log_in(request, link.user_id, hashed)
        if logged_in is None:
            raise Forbidden("your password is set, but this account is suspended")
        return logged_in

    async def change_password(self, visit: PageRequest) -> Response:
        """Set a new password, which ends all sessions, and log this browser in again. Raise
        UserError."""
        old, new = visit.form.get("old_password", ""), new_password(visit.form, "new_password")
        network = visit.actor.network
        hashed = await self.api.users.change_password(visit.session, old, new, network)
        return await self._log_in(visit.request, visit.session.user_id, hashed) or to(LOGIN)


def new_password(form: Mapping[str, str], name: str) -> str:
    """Return the new password of a form. Raise UserError if the two fields differ."""
    if form.get(name, "") != form.get("again", ""):
        raise UserError("the two passwords don't match")
    return form.get(name, "")


USER_ACTIONS: dict[str, Action] = {"add": add_user, "reset": reset_user, "remove": remove_user}

KEY_ACTIONS: dict[str, Action] = {"add": add_key, "rotate": rotate_key, "revoke": revoke_key}


def _on_account(operation: Operation, *fields: str) -> Action:
    async def action(visit: PageRequest) -> None:
        account = visit.request.path_params["account"]
        await visit.do(operation, visit.fields(*fields), account=account)

    return action


MANAGE_ACTIONS: dict[str, Action] = {
    "set": set_account,
    "suspend": _on_account(API.suspend_account, "reason"),
    "resume": _on_account(API.resume_account),
    "throttle": _on_account(API.throttle_account, "factor", "until"),
    "pay": _on_account(API.add_payment, "amount", "reference", "reason"),
}
