"""The dashboard's routes: each page with its template, its forms and the role that it requires."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from redbtc.admin.actors import Rank
from redbtc.admin.api import API
from redbtc.dashboard.account_pages import (
    MANAGE_ACTIONS,
    TABS,
    account_notices_page,
    account_overview_page,
    manage_page,
    members_page,
)
from redbtc.dashboard.document_pages import DocumentPages
from redbtc.dashboard.forms import ProcessedForms
from redbtc.dashboard.key_page import KEY_ACTIONS, keys_page
from redbtc.dashboard.login import LoginPages
from redbtc.dashboard.operator_pages import (
    accounts_page,
    add_account,
    add_notice,
    add_price,
    end_session,
    log_page,
    notices_page,
    overview_page,
    own_login_page,
    prices_page,
    rest_upstream,
    resume_upstream,
    send_test_message,
    users_page,
    webhook_page,
    withdraw_notice,
)
from redbtc.dashboard.page_request import (
    ACCEPT,
    LOGIN,
    PageHandler,
    PageRequest,
    logged_in,
    redirect,
)
from redbtc.dashboard.parts import USER_ACTIONS
from redbtc.dashboard.rendering import DASHBOARD_FOLDER, PageVariables, Renderer, error_status
from redbtc.dashboard.request_page import REQUEST_ACTIONS, request_page
from redbtc.dashboard.screens import NO_ACTIONS, Actions, Screen, Show
from redbtc.dashboard.sessions import PAGE_HEADERS
from redbtc.dashboard.settings_closing import TERMINATING_ACTIONS
from redbtc.dashboard.settings_page import SETTINGS_ACTIONS, settings_page
from redbtc.dashboard.usage_pages import (
    billing_page,
    statement_csv,
    statement_page,
    usage_csv,
    usage_page,
)
from redbtc.errors import UserError

ACCOUNT_PATH = "/dashboard/accounts/{account}"
# The beginnings of the paths of pages that owners see before they accept new documents.
BEFORE_ACCEPTANCE = (ACCEPT, "/dashboard/logout", f"{ACCOUNT_PATH}/settings")
PROBLEMS = {404: "Page not found.", 500: "The gateway could not process this request."}


class Dashboard:
    """The pages, built on the operations of the admin API."""

    def __init__(self, api: API) -> None:
        self._api = api
        self._renderer = Renderer(api.billing.currency, api.billing.documents)
        self._processed = ProcessedForms()
        self._login = LoginPages(api.users, self._renderer)
        self.documents = DocumentPages(api, self._renderer)

    async def render(self, template: str, variables: PageVariables) -> Response:
        """Return a page for anyone, logged in or not."""
        return await self._renderer.render(template, variables)

    def app(self) -> Starlette:
        """Return the dashboard as an ASGI app."""
        handlers: dict[Any, Any] = {
            UserError: self._refused,
            HTTPException: self._failed,
            Exception: self._failed,
        }
        routes = [*self._public_routes(), *self._operator_routes(), *self._account_routes()]
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    def _public_routes(self) -> list[Route]:
        login = self._login
        return [
            Route("/dashboard/style.css", asset("style.css", "text/css")),
            Route("/dashboard/dashboard.js", asset("dashboard.js", "text/javascript")),
            Route(LOGIN, login.log_in, methods=["GET", "POST"]),
            Route("/dashboard/link/{link}", login.follow_link, methods=["GET", "POST"]),
        ]

    def _operator_routes(self) -> list[Route]:
        screen, login = self._screen, self._login
        notice_actions: Actions = {"add": add_notice, "end": withdraw_notice}
        own_actions: Actions = {"end": end_session, "password": login.change_password}
        return [
            self._route("/dashboard", home),
            self._route("/dashboard/", home),
            self._route("/dashboard/logout", login.log_out, "POST"),
            self._route(ACCEPT, self.documents.accept, "GET", "POST"),
            screen("/dashboard/you", "you.html", own_login_page, own_actions, min_rank="viewer"),
            screen(
                "/dashboard/overview",
                "overview.html",
                overview_page,
                {"rest": rest_upstream, "resume": resume_upstream},
                min_rank="operator",
            ),
            screen(
                "/dashboard/accounts",
                "accounts.html",
                accounts_page,
                {"add": add_account},
                min_rank="operator",
            ),
            screen(
                "/dashboard/prices",
                "prices.html",
                prices_page,
                {"add": add_price},
                min_rank="operator",
            ),
            screen(
                "/dashboard/notices",
                "notices.html",
                notices_page,
                notice_actions,
                min_rank="operator",
            ),
            screen("/dashboard/log", "log.html", log_page, min_rank="operator"),
            screen(
                "/dashboard/webhook",
                "webhook.html",
                webhook_page,
                {"test": send_test_message},
                min_rank="operator",
            ),
            screen("/dashboard/users", "users.html", users_page, USER_ACTIONS, min_rank="operator"),
        ]

    def _account_routes(self) -> list[Route]:
        def tab(name: str, path: str, template: str, show: Show, actions: Actions) -> Route:
            return self._screen(
                f"{ACCOUNT_PATH}{path}", template, show, actions, min_rank=TABS[name]
            )

        manage_actions = {**MANAGE_ACTIONS, **TERMINATING_ACTIONS}
        return [
            tab("Overview", "", "account_overview.html", account_overview_page, NO_ACTIONS),
            tab("Keys", "/keys", "keys.html", keys_page, KEY_ACTIONS),
            tab("Usage", "/usage", "usage.html", usage_page, NO_ACTIONS),
            tab("Usage", "/usage/{request}", "request.html", request_page, REQUEST_ACTIONS),
            self._route(f"{ACCOUNT_PATH}/usage.csv", usage_csv),
            tab("Billing", "/billing", "billing.html", billing_page, NO_ACTIONS),
            tab("Billing", "/billing/{month}", "statement.html", statement_page, NO_ACTIONS),
            self._route(f"{ACCOUNT_PATH}/billing/{{month}}/csv", statement_csv),
            tab("Members", "/members", "members.html", members_page, USER_ACTIONS),
            tab("Notices", "/notices", "account_notices.html", account_notices_page, NO_ACTIONS),
            tab("Settings", "/settings", "settings.html", settings_page, SETTINGS_ACTIONS),
            tab("Manage", "/manage", "manage.html", manage_page, manage_actions),
        ]

    def _screen(
        self, path: str, template: str, show: Show, actions: Actions = NO_ACTIONS, *, min_rank: Rank
    ) -> Route:
        screen = Screen(self._renderer, self._processed, template, show, actions, min_rank)
        return self._route(path, screen, "GET", *(["POST"] if actions else []))

    def _route(self, path: str, handler: PageHandler, *methods: str) -> Route:
        early = path.startswith(BEFORE_ACCEPTANCE)
        endpoint = logged_in(self._api, handler, before_acceptance=early)
        return Route(path, endpoint, methods=methods or ["GET"])

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, UserError), "it handles no other"
        return await self._renderer.render_error("error.html", error, {"code": error_status(error)})

    async def _failed(self, _: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        problem = PROBLEMS.get(status, "This request isn't supported.")
        return await self._renderer.render(
            "error.html", {"code": status, "problem": problem}, status
        )


async def home(page: PageRequest) -> Response:
    """Redirect to the first page: the user's account, or for an operator the overview."""
    account = page.session.account_id
    return redirect(f"/dashboard/accounts/{account}" if account else "/dashboard/overview")


def asset(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for a file of the folder static/."""
    content = (DASHBOARD_FOLDER / "static" / name).read_bytes()
    headers = {**PAGE_HEADERS, "cache-control": "public, max-age=300"}

    async def endpoint(_: Request) -> Response:
        return Response(content, headers=headers, media_type=media_type)

    return endpoint
