"""The dashboard: pages for operators and for the members of accounts, drawn by the server.

A page is a template and what operations of the admin API answer; a form is one operation. So the
API says who may do what and what is well formed, and a page knows no SQL and no rule of its own.
All that people have named is somebody else's text: the templates escape it, and no script, style or
picture that is not the gateway's own is ever loaded (Content-Security-Policy).

Pages are drawn one at a time and in slices of a quarter of a millisecond, with the event loop's
other work between them: what is being forwarded meanwhile doesn't wait for a page, whatever there
is to be seen on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import shlex
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from datetime import date, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl, urlencode

import jinja2
import jinja2.meta
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from redbtc_admin import (
    API,
    OTHERWISE,
    RANKS,
    STATUS,
    Forbidden,
    Invalid,
    Operation,
    Rank,
    check_fields,
    in_parts,
    retry_after,
    whole_body,
)
from redbtc_billing import DAY, UNITS, Rates, few, matches, told_of_prices
from redbtc_charts import Series, stacked
from redbtc_ledger import Record
from redbtc_reports import csv_line, csv_lines, statement_lines
from redbtc_settings import (
    LedgerError,
    NotFound,
    day_of,
    digits_of,
    iso_time,
    money,
    shipped,
)
from redbtc_shapes import RequestShown
from redbtc_slices import with_turns
from redbtc_users import Later, Session
from redbtc_visitors import (
    BROWSER_SECONDS,
    SAFE,
    SECURITY,
    actor_for,
    check_origin,
    cookie_of,
    network_of,
    session_of,
    set_cookie,
)

MOST_FORM_BYTES = 64 << 10
ONCE = re.compile("[0-9a-f]{16}")
PAGE = re.compile("[1-9][0-9]{0,5}")
MOST_SENT = 10_000  # forms that are known to have been sent

# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────


def exact(amount: str | None, currency: str) -> str:
    """All its digits, and at least the currency's; a dash where it is not known."""
    if amount is None:
        return "–"
    whole, _, fraction = amount.partition(".")
    fraction = fraction.ljust(digits_of(currency), "0")
    sign, whole = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    return f"{sign}{int(whole):,}{'.' * bool(fraction)}{fraction}"


def aligned(amount: str | None, currency: str) -> str:
    """The same, so that the points of a column stand below each other: filled up with spaces as
    wide as a digit."""
    digits = exact(amount, currency)
    _, point, fraction = digits.partition(".")
    return digits + "\u2007" * (9 - len(fraction) + (not point)) if amount else digits


def count(number: int | None) -> str:
    """With thousands apart; a dash where it is not known."""
    return "–" if number is None else f"{number:,}"


def size(number: int) -> str:
    """Of bytes."""
    amount, unit = float(number), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def duration(seconds: int) -> str:
    """2 days, 3:04:05."""
    return str(timedelta(seconds=seconds))


def utc(moment: str, digits: int = 16) -> str:
    """As it stands on a page before a script puts it into the reader's zone: to the minute, or with
    19 to the second."""
    return f"{moment[:10]} {moment[11:digits]} UTC"


BROWSERS = {"Edg/": "Edge", "OPR/": "Opera", "Firefox": "", "Chrome": "", "Safari": ""}
SYSTEMS = {"Android": "", "iPhone": "", "iPad": "", "Windows": "", "Mac OS": "macOS", "Linux": ""}


def browser(agent: str) -> str:
    """What a User-Agent header tells people: Firefox on Linux; else its first word."""
    name, system = (
        next((called or mark for mark, called in known.items() if mark in agent), "")
        for known in (BROWSERS, SYSTEMS)  # of the names that it goes by, the first here
    )
    return f"{name} on {system}" if name and system else agent.partition(" ")[0] or "unknown"


def literal(text: str) -> str:
    """A string as JSON has it, which Python, JavaScript and TOML read as the same."""
    return orjson.dumps(text).decode()


class Loader(jinja2.FileSystemLoader):
    """Compiles with a template those that it names, so that none is while it is drawn."""

    def load(
        self,
        environment: jinja2.Environment,
        name: str,
        globals: MutableMapping[str, Any] | None = None,
    ) -> jinja2.Template:
        source, path, _ = self.get_source(environment, name)
        parsed = environment.parse(source, name, path)
        for other in filter(None, jinja2.meta.find_referenced_templates(parsed)):
            environment.get_template(other)
        code = environment.compile(parsed, name, path)
        return environment.template_class.from_code(environment, code, globals or {})


def environment() -> jinja2.Environment:
    """The templates; what they print is escaped."""
    found = jinja2.Environment(
        loader=Loader(shipped("dashboard")),
        autoescape=True,
        auto_reload=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        money=money, exact=exact, count=count, size=size, utc=utc, duration=duration
    )
    found.filters.update(aligned=aligned, literal=literal, shell=shlex.quote, browser=browser)
    found.tests["moment"] = lambda value: isinstance(value, str) and bool(MOMENT.fullmatch(value))
    found.globals["once"] = lambda: secrets.token_hex(8)
    return found


async def draw(template: jinja2.Template, context: Mapping[str, Any]) -> bytes:
    """A page."""
    parts = [part async for part in with_turns(template.generate(context))]
    return "".join(parts).encode("utf-8", "replace")


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────

BAD_LOGIN = "Address and password don't belong together."
SUSPENDED = "This account is suspended."
SEVERAL = "This is the password of several logins: choose one, and type it again."
UNKNOWN = {404: "There is no such page.", 500: "The gateway failed on this."}
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


class Visit:
    """A request to the dashboard of somebody who is logged in."""

    def __init__(
        self, dashboard: Dashboard, request: Request, session: Session, form: dict[str, str]
    ) -> None:
        self.request = request
        self.actor = actor_for(session, request)
        self.session = session
        self.form = form
        self._dashboard = dashboard

    async def ask(
        self, operation: Operation, *, query: Mapping[str, Any] | None = None, **path: str
    ) -> Any:
        """What an operation answers. Raises LedgerError."""
        return await self._dashboard.api.perform(operation, self.actor, path, query=query)

    async def do(self, operation: Operation, body: Mapping[str, Any], **path: str) -> Any:
        """Make a change with what a form says. Raises LedgerError."""
        return await self._dashboard.api.perform(operation, self.actor, path, body=body)

    @property
    def now(self) -> int:
        """The ledger's time, in milliseconds."""
        return self._dashboard.api.books.store.time()

    async def example_model(self, patterns: Sequence[str] | None) -> str:
        """As the API has it."""
        return await self._dashboard.api.example_model(patterns)

    def is_logged_in(self) -> bool:
        """Still. Raises LedgerError."""
        return session_of(self._dashboard.api, self.request) is not None

    def fields(self, *names: str) -> dict[str, str]:
        """Those of the form that were filled in."""
        filled_in = {name: self.form.get(name, "").strip() for name in names}
        return {name: text for name, text in filled_in.items() if text}


Context = dict[str, Any]
Handler = Callable[[Visit], Awaitable[Response]]
Show = Callable[[Visit], Awaitable[Context]]
Action = Callable[[Visit], Awaitable[Context | Response | None]]
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
            LedgerError: self._refused,
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

        async def handler(visit: Visit) -> Response:
            if RANKS[visit.actor.rank] < RANKS[least]:
                raise Forbidden("this is not for your role")
            made: Context = {"done": "done" in visit.request.query_params}
            refused = None
            if visit.request.method not in SAFE:
                try:
                    answer = await self._act(visit, actions)
                except (NotFound, Forbidden):
                    raise
                except LedgerError as error:
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

    async def _act(self, visit: Visit, actions: Mapping[str, Action]) -> Context | Response | None:
        action = actions.get(visit.form.get("do", ""))
        if action is None:
            raise Forbidden("there is no such form")
        with self._once(visit.session, visit.form.pop("once", "")):
            return await action(visit)

    @contextlib.contextmanager
    def _once(self, session: Session, token: str) -> Iterator[None]:
        """What a form on a page asks for is done once, however often it is sent (a page is loaded
        again, a button clicked twice), as long as the gateway runs. Raises LedgerError."""
        if not ONCE.fullmatch(token):  # of no page of ours
            yield
            return
        form = session.user_id, token
        if form in self._sent:
            raise LedgerError("this form was sent before; a key or link is shown only once")
        self._sent[form] = None
        if len(self._sent) > MOST_SENT:
            self._sent.popitem(last=False)
        try:
            yield
        except BaseException:
            self._sent.pop(form, None)
            raise

    async def home(self, visit: Visit) -> Response:
        """Where one begins."""
        account_id = visit.session.account_id
        return to(f"/dashboard/accounts/{account_id}" if account_id else "/dashboard/overview")

    @staticmethod
    def _asset(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        content = shipped(f"dashboard/{name}").read_bytes()
        headers = {**SECURITY, "cache-control": "public, max-age=300"}

        async def asset(_: Request) -> Response:
            return Response(content, headers=headers, media_type=kind)

        return asset

    async def page(
        self, name: str, context: Context, status: int = 200, refused: LedgerError | None = None
    ) -> Response:
        """A template as an answer; with `refused` it says why."""
        if refused:
            status = STATUS.get(type(refused), OTHERWISE)
            context = {**context, **explanation(refused)}
        usual: Context = {
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
        assert isinstance(error, LedgerError), "it handles no other"
        code = STATUS.get(type(error), OTHERWISE)
        return await self.page("error.html", {"code": code}, refused=error)

    async def _unknown(self, _: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        problem = UNKNOWN.get(status, "This can't be asked for so.")
        return await self.page("error.html", {"code": status, "problem": problem}, status)

    @staticmethod
    async def _form(request: Request) -> dict[str, str]:
        """What was filled in. Raises LedgerError."""
        check_fields(request.scope["query_string"])
        body = await whole_body(request, MOST_FORM_BYTES)
        check_fields(body)
        return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))

    def logged_in(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """For whoever is logged in; others are sent to the login."""

        async def endpoint(request: Request) -> Response:
            session, form = session_of(self.api, request), {}
            check_fields(request.scope["query_string"])
            if session and request.method not in SAFE:
                check_origin(request)
                form = await self._form(request)
                session = session_of(self.api, request)  # it may have ended meanwhile
            if session is None:
                return to_login(request)
            return await handler(Visit(self, request, session, form))

        return endpoint

    # Logging in

    async def login(self, request: Request) -> Response:
        """Address and password, and where several logins have both, which one."""
        shown: Context = {"email": "", "logins": []}
        if request.method in SAFE:
            return await self.page("login.html", shown)
        check_origin(request)
        form = await self._form(request)
        shown["email"] = email = form.get("email", "")[:254]
        browser = cookie_of(request, "redbtc-browser")
        network, password = network_of(request), form.get("password", "")
        try:
            found = await self.api.users.verify(email, password, network, browser)
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
        """To the page that was asked for; None where the password is not right any more."""
        browser = request.headers.get("user-agent", "")
        known_by = cookie_of(request, "redbtc-browser")
        former = cookie_of(request, "redbtc")
        logged_in = await self.api.users.log_in(user_id, hashed, browser, known_by, former)
        if logged_in is None:
            return None
        wanted = request.query_params.get("next", "")
        path = wanted if wanted.startswith("/dashboard/") else HOME
        response = RedirectResponse(path, 303, SECURITY)
        set_cookie(request, response, "redbtc", logged_in.cookie, None)
        set_cookie(request, response, "redbtc-browser", logged_in.browser, BROWSER_SECONDS)
        return response

    async def log_out(self, visit: Visit) -> Response:
        """This session ends."""
        await self.api.users.end_session(visit.session.id, visit.session.user_id)
        response = to(LOGIN)
        set_cookie(visit.request, response, "redbtc", "", 0)
        return response

    async def link(self, request: Request) -> Response:
        """A one-time link: looking at it doesn't use it up, setting a password does."""
        link = self.api.users.link(request.path_params["link"])
        shown: Context = {"email": link.email if link else ""}
        if not link or request.method in SAFE:
            return await self.page("link.html", shown, 200 if link else 404)
        check_origin(request)
        form = await self._form(request)
        try:
            password = new_password(form, "password")
            hashed = await self.api.users.set_password(link, password, network_of(request))
        except LedgerError as error:
            return await self.page("link.html", shown, refused=error)
        logged_in = await self._log_in(request, link.user_id, hashed)
        if logged_in is None:
            raise Forbidden("the password is set, but this account is suspended")
        return logged_in

    async def change_password(self, visit: Visit) -> Response:
        """All sessions end with it; this browser gets a new one. Raises LedgerError."""
        old, new = visit.form.get("old_password", ""), new_password(visit.form, "new_password")
        network = visit.actor.network
        hashed = await self.api.users.change_password(visit.session, old, new, network)
        return await self._log_in(visit.request, visit.session.user_id, hashed) or to(LOGIN)


def new_password(form: Mapping[str, str], name: str) -> str:
    """That of a form, where it was typed twice alike. Raises LedgerError."""
    if form.get(name, "") != form.get("again", ""):
        raise LedgerError("the two passwords differ")
    return form.get(name, "")


def sentence(text: str) -> str:
    """A message as pages show it; a name that it begins with stays as it is."""
    first = text.partition(" ")[0]
    return f"{text[:1].upper() if first.isalpha() else text[:1]}{text[1:]}."


def explanation(error: LedgerError) -> Context:
    """Why a form was refused, and which of its fields was wrong, where it was one."""
    if isinstance(error, Invalid) and error.field:
        what = error.what.removesuffix(", got `str`")
        if what.startswith("Object missing"):
            what = f"{error.field} is needed"
        return {"problem": sentence(what), "wrong": error.field}
    return {"problem": sentence(str(error))}


# ── Operators' pages ─────────────────────────────────────────────────────────────────────────────

DAYS = 30  # that charts show
ON_A_PAGE = 50


def last_days(now: int) -> list[str]:
    """Return the days (UTC) that charts show, the one of `now` (milliseconds) last."""
    today = now // DAY
    return [day_of(day) for day in range(today - DAYS + 1, today + 1)]


def by_day(
    rows: Iterable[Mapping[str, Any]], days: Sequence[str], name: str, value: str
) -> list[Series]:
    """One series for each `name` among the rows, of their `value` by day."""
    places = {day: place for place, day in enumerate(days)}
    series: dict[str | None, list[Decimal]] = {}
    for row in rows:
        if row["day"] in places:
            values = series.setdefault(row[name], [Decimal(0)] * len(days))
            values[places[row["day"]]] += Decimal(row[value] or 0)
    return [Series(each, tuple(values)) for each, values in series.items()]


async def overview(visit: Visit) -> Context:
    """What an operator looks at first."""
    found = await visit.ask(API.overview, query={"days": DAYS})
    days, currency = last_days(visit.now), found["spending"]["currency"]
    for row in found["traffic"]:
        row["outcome"] = row["outcome"].replace("_", " ")
    requests = by_day(found["traffic"], days, "outcome", "requests")
    costs = by_day(found["traffic"], days, "upstream", "cost")
    return {
        "here": "Overview",
        "found": found,
        "columns": [
            "Day",
            *(f"#Requests, {each.name}" for each in requests),
            *(f"#{currency}, {each.name}" for each in costs),
        ],
        "table": {
            day: [
                *(f"{each.values[place]:,}" for each in requests),
                *(exact(f"{each.values[place]:f}", currency) for each in costs),
            ]
            for place, day in enumerate(days)
        },
        "traffic": stacked(
            "Requests by day", "All accounts.", days, requests, unit="requests", prefix="r"
        ),
        "spend": stacked(
            "Spend by day and upstream", "All accounts.", days, costs, unit=currency, prefix="s"
        ),
    }


def part_of(visit: Visit, name: str, rows: list[Record], parameter: str = "page") -> Context:
    """Those of so many rows that are on the page that is asked for, and how to ask for the one
    before and the next, with other parameters as they are."""
    asked = dict(visit.request.query_params)
    wanted = asked.get(parameter, "")
    last = max(1, -(-len(rows) // ON_A_PAGE))
    page = min(int(wanted), last) if PAGE.fullmatch(wanted) else 1
    shown = rows[(page - 1) * ON_A_PAGE : page * ON_A_PAGE]
    asked.pop("done", None)
    pages = {each: urlencode({**asked, parameter: each}) for each in (page - 1, page + 1)}
    return {
        name: shown,
        f"{name}_pages": {
            "page": page,
            "last": last,
            "before": pages[page - 1] if page > 1 else "",
            "next": pages[page + 1] if page < last else "",
        },
    }


async def accounts(visit: Visit) -> Context:
    """All of them, or those that are searched for."""
    asked = visit.request.query_params
    search, after = asked.get("search", "")[:200], asked.get("after", "")[:200]
    query = {"search": search, "after": after, "limit": ON_A_PAGE + 1}
    found = (await visit.ask(API.list_accounts, query=query))["accounts"]
    return {
        "here": "Accounts",
        "accounts": found[:ON_A_PAGE],
        "search": search,
        "next": urlencode({"search": search, "after": found[ON_A_PAGE - 1]["name"]})
        if len(found) > ON_A_PAGE
        else "",
        "blank": dict.fromkeys(ACCOUNT_FIELDS),
    }


ACCOUNT_FIELDS = (
    "email",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "credit_limit",
    "monthly_budget",
)


async def add_account(visit: Visit) -> None:
    """With the limits of the settings where none are filled in."""
    await visit.do(API.add_account, visit.fields("name", *ACCOUNT_FIELDS))


async def prices(visit: Visit) -> Context:
    """All prices."""
    return {"here": "Prices", **await _prices(visit, await visit.ask(API.list_prices))}


async def _prices(visit: Visit, found: Record) -> Context:
    """Those in force and coming, then the past ones; all, or those for a model or with such a name,
    a part at a time."""
    model = visit.request.query_params.get("model", "")[:256].strip()
    rows = [
        row
        async for row in with_turns(found["prices"])
        if model in row["model"] or matches(model, {row["model"]})
    ]
    rows.sort(key=lambda row: row["status"] == "past")
    part = part_of(visit, "prices", rows, "prices")
    return {**part, "model": model, "any_prices": bool(found["prices"]), **RATES}


def label(rate: str) -> str:
    """Return what people call a rate."""
    return rate.replace("_", " ").capitalize()


RATES = {
    "rates": {
        rate: f"{label(rate)} (per {UNITS.get(rate, 'million tokens')})" for rate in Rates._fields
    },
    "rate_columns": [f"#{label(rate)}" for rate in Rates._fields],
    "few": few,
}
PRICE_FIELDS = ("model", "tier", "above_input_tokens", "effective", "max_output_tokens", "source")


async def add_price(visit: Visit) -> Context:
    """Add a price and tell what that means."""
    price = visit.fields(*PRICE_FIELDS, *Rates._fields)
    added = await visit.do(API.add_prices, {"prices": [price], **visit.fields("without_notice")})
    done = "Price added." if added["added"] else "This is the price already: nothing was added."
    return {"done": " ".join([done, *told_of_prices(added)])}


async def notices(visit: Visit) -> Context:
    """Those that hold or will, and the last that are over; the newest first."""
    now = iso_time(visit.now) or ""
    held: list[Record] = []
    over: list[Record] = []
    for each in reversed((await visit.ask(API.list_notices))["notices"]):
        is_over = each["withdrawn_at"] or (each["until"] or now) < now
        (over if is_over else held).append(each)
    return {"here": "Notices", **part_of(visit, "notices", held), "over": over[:ON_A_PAGE]}


async def add_notice(visit: Visit) -> None:
    """And, of a maintenance, whether requests are refused meanwhile."""
    body = visit.fields("kind", "text", "effective", "until")
    refuses = "true" if visit.form.get("refuses_requests") else "false"
    await visit.do(API.add_notice, {**body, "refuses_requests": refuses})


async def end_notice(visit: Visit) -> None:
    """Nobody is told it any more."""
    await visit.do(API.withdraw_notice, {}, notice=visit.form.get("notice", ""))


async def log(visit: Visit) -> Context:
    """Every administrative change, or those of one account."""
    asked = visit.request.query_params
    query = {name: asked[name] for name in ("before", "account") if asked.get(name)}
    limit = {"limit": str(ON_A_PAGE + 1)}
    found = (await visit.ask(API.list_changes, query={**query, **limit}))["changes"]
    changes, more = found[:ON_A_PAGE], len(found) > ON_A_PAGE
    of = query.get("account")
    return {
        "here": "Log",
        "account": await visit.ask(API.show_account, account=of) if of else None,
        "changes": [(each, subject(each), differences(each)) for each in changes],
        "older": urlencode({**query, "before": changes[-1]["id"]}) if more else "",
    }


def subject(change: Mapping[str, Any]) -> str:
    """What people call what was changed; empty where they call it nothing."""
    about = change["after"] or change["before"] or {}
    names = ("name", "email", "label", "model", "text", "reference")
    return next((str(about[name]) for name in names if about.get(name)), "")[:100]


def differences(change: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Of a change, each column that is not as it was: its name, before and after."""
    before, after = change["before"] or {}, change["after"] or {}
    return [
        (name.replace("_", " "), before.get(name), after.get(name))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]


async def users(visit: Visit) -> Context:
    """Who may do everything."""
    return {"here": "Users", **part_of(visit, "users", await _users(visit)), "added": None}


async def add_user(visit: Visit) -> Context:
    """Shows the link with which a password is set."""
    body = visit.fields("email", "role")
    if account := visit.request.path_params.get("account"):
        body["account"] = (await visit.ask(API.show_account, account=account))["name"]
    return {"added": await visit.do(API.add_user, body)}


async def _users(visit: Visit) -> list[Record]:
    """Whom this page is about: an account's members, or the operators."""
    account = visit.request.path_params.get("account")
    query = {"account": account} if account else {"role": "operator"}
    found: list[Record] = (await visit.ask(API.list_users, query=query))["users"]
    return found


async def _user(visit: Visit) -> str:
    """The id of the one that a form names, where it is one of them."""
    user_id = visit.form.get("user", "")
    if all(user["id"] != user_id for user in await _users(visit)):
        raise NotFound("there is no such user")
    return user_id


async def reset_user(visit: Visit) -> Context:
    """A new link; the password and the sessions end."""
    return {"added": await visit.do(API.reset_user, {}, user=await _user(visit))}


async def remove_user(visit: Visit) -> None:
    """And log them out."""
    await visit.do(API.remove_user, {}, user=await _user(visit))


USER_ACTIONS: dict[str, Action] = {"add": add_user, "reset": reset_user, "remove": remove_user}


async def you(visit: Visit) -> Context:
    """One's own password and sessions."""
    return {"here": "You", **await visit.ask(API.list_sessions)}


async def end_session(visit: Visit) -> None:
    """Log out there."""
    await visit.do(API.end_session, {}, session=visit.form.get("session", ""))


# ── An account's pages ───────────────────────────────────────────────────────────────────────────
# For its members, and for operators.


async def _account(visit: Visit, here: str) -> Context:
    """What all of them show. Raises NotFound."""
    account = await visit.ask(API.show_account, account=visit.request.path_params["account"])
    rank = RANKS[visit.actor.rank]
    return {
        "here": "Accounts",
        "tab": here,
        "tabs": [tab for tab, least in TABS.items() if rank >= RANKS[least]],
        "account": account,
        "path": f"/dashboard/accounts/{account['id']}",
        "may_change": rank >= RANKS["owner"],
    }


TABS: dict[str, Rank] = {
    "Overview": "viewer",
    "Keys": "viewer",
    "Usage": "viewer",
    "Billing": "viewer",
    "Members": "owner",
    "Notices": "viewer",
    "Manage": "operator",
}
MOST_TOLD = 5  # notices on the overview
MEASURES = {"cost": "Cost", "requests": "Requests", "output_tokens": "Output tokens"}


async def account_overview(visit: Visit) -> Context:
    """Spent, used, left."""
    shown = await _account(visit, "Overview")
    account_id, month = shown["account"]["id"], shown["account"]["month"]
    days = last_days(visit.now)
    query = {"account": account_id, "since": days[0], "group_by": "day,model", "top": "10"}
    used = await visit.ask(API.usage, query=query)
    measure = visit.request.query_params.get("show", "cost")
    measure = measure if measure in MEASURES else "cost"
    series = by_day(used["groups"], days, "model", measure)
    notices = (await visit.ask(API.account_notices, account=account_id))["notices"]
    unit = shown["account"]["currency"] if measure == "cost" else MEASURES[measure].lower()
    return {
        **shown,
        "month": (await _statement(visit, account_id, month, 0))["totals"],
        "limits": await visit.ask(API.account_limits, account=account_id),
        "notices": notices[-MOST_TOLD:][::-1],
        "more_notices": max(0, len(notices) - MOST_TOLD),
        "groups": used["groups"],
        "measure": measure,
        "measures": MEASURES,
        "chart": stacked(
            f"{unit} by day and model", "The last 30 days.", days, series, unit=unit, prefix="a"
        ),
    }


async def keys(visit: Visit) -> Context:
    """Those in force, then the others; each the newest first."""
    shown = await _account(visit, "Keys")
    found = (await visit.ask(API.list_keys, account=shown["account"]["id"]))["keys"]
    now = iso_time(visit.now) or ""
    async for key in with_turns(found):
        ended = key["expires_at"] is not None and key["expires_at"] <= now
        key["state"] = "revoked" if key["revoked_at"] else "expired" if ended else "in force"
    found.reverse()
    found.sort(key=lambda key: key["state"] != "in force")
    return {**shown, **part_of(visit, "keys", found), "added": None}


KEY_FIELDS = (
    "label",
    "models",
    "expires",
    "monthly_budget",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
)


async def _new_key(visit: Visit, added: Record) -> Context:
    """It is shown this once, and how to use it."""
    url, host = visit.request.url, visit.request.headers.get("host", "")
    model = await visit.example_model(added["models"])
    return {"added": added, "base_url": f"{url.scheme}://{host}/v1", "model": model}


async def add_key(visit: Visit) -> Context:
    """One more of this account."""
    body = visit.fields(*KEY_FIELDS)
    account = visit.request.path_params["account"]
    return await _new_key(visit, await visit.do(API.add_key, body, account=account))


async def _key(visit: Visit) -> str:
    """The id of the one that a form names, where it is of this page's account."""
    account = visit.request.path_params["account"]
    found = (await visit.ask(API.list_keys, account=account))["keys"]
    key_id = visit.form.get("key", "")
    if all(key["id"] != key_id for key in found):
        raise NotFound("there is no such key")
    return key_id


async def rotate_key(visit: Visit) -> Context:
    """A new one in its place."""
    body = visit.fields("overlap")
    return await _new_key(visit, await visit.do(API.rotate_key, body, key=await _key(visit)))


async def revoke_key(visit: Visit) -> Context | None:
    """From the next request on; of a compromised one what runs is cut."""
    compromised = "true" if visit.form.get("compromised") else "false"
    done = await visit.do(API.revoke_key, {"compromised": compromised}, key=await _key(visit))
    return {"done": f"Revoked. Cut in flight: {done['cut']}."} if done["compromised"] else None


KEY_ACTIONS: dict[str, Action] = {"add": add_key, "rotate": rotate_key, "revoke": revoke_key}


def _filters(visit: Visit, account_id: str) -> tuple[dict[str, str], dict[str, str]]:
    """What is asked for, as it stands in the page's address and as the API has it: there the last
    day is one that counts."""
    asked = visit.request.query_params
    shown = {name: asked.get(name, "")[:256] for name in ("key", "model", "since", "until")}
    query = {name: value for name, value in shown.items() if value} | {"account": account_id}
    with contextlib.suppress(ValueError, OverflowError):
        query["until"] = str(date.fromisoformat(shown["until"]) + timedelta(days=1))
    return shown, query


MOST_OFFERED = 200  # keys, to choose one of


async def usage(visit: Visit) -> Context:
    """Each request, the newest first, and sums of all that the filters let through."""
    shown = await _account(visit, "Usage")
    account_id = shown["account"]["id"]
    known = (await visit.ask(API.list_keys, account=account_id))["keys"]
    filters, query = _filters(visit, account_id)
    offered = known[-MOST_OFFERED:]
    kept = {name: value for name, value in filters.items() if value}
    shown |= {
        "filters": filters,
        "keys": [key for key in known[:-MOST_OFFERED] if key["id"] == filters["key"]] + offered,
        "csv": f"{shown['path']}/usage.csv?{urlencode(kept)}",
        "totals": None,
    }
    part = {"limit": str(ON_A_PAGE + 1)}
    if before := visit.request.query_params.get("before"):
        part["before"] = before
    try:
        totals = (await visit.ask(API.usage, query=query))["totals"]
        found = await visit.ask(API.requests, query={**query, **part})
    except NotFound:
        raise
    except LedgerError as error:
        return {**shown, **explanation(error)}
    rows = found["requests"][::-1]
    more = len(rows) > ON_A_PAGE
    used = {row["key_id"] for row in rows}
    return {
        **shown,
        "totals": totals,
        "labels": {key["id"]: key["label"] or key["id"] for key in known if key["id"] in used},
        "requests": rows[:ON_A_PAGE],
        "older": urlencode({**kept, "before": rows[ON_A_PAGE - 1]["request_id"]}) if more else "",
    }


async def usage_csv(visit: Visit) -> Response:
    """The same as CSV, all of it, the newest first: read in parts, each of one instant, so that who
    reads slowly holds nothing up."""
    account_id = (await _account(visit, "Usage"))["account"]["id"]
    _, query = _filters(visit, account_id)
    query["limit"] = "1000"
    rows = (await visit.ask(API.requests, query=query))["requests"][::-1]

    async def lines() -> AsyncIterator[str]:
        nonlocal rows
        yield csv_line(RequestShown.__struct_fields__)
        while rows:
            if not visit.is_logged_in():
                visit.request.scope["abort"]()  # so that nobody takes it for the whole
                return
            text = "".join([csv_line(row.values()) async for row in with_turns(rows)])
            older = {**query, "before": rows[-1]["request_id"]}
            rows = []  # takes ten times the memory of its text, while a client reads slowly
            yield text
            rows = (await visit.ask(API.requests, query=older))["requests"][::-1]

    return StreamingResponse(lines(), headers=as_file("usage.csv"), media_type="text/csv")


def as_file(name: str) -> dict[str, str]:
    """Headers of what is to be kept."""
    return {**SECURITY, "content-disposition": f'attachment; filename="{name}"'}


async def billing(visit: Visit) -> Context:
    """Statements, payments, prices."""
    shown = await _account(visit, "Billing")
    account_id = shown["account"]["id"]
    months = (await visit.ask(API.list_months, account=account_id))["months"]
    now = await _statement(visit, account_id, shown["account"]["month"], 0)
    payments = (await visit.ask(API.account_payments, account=account_id))["payments"]
    return {
        **shown,
        "months": months,
        "paid": now["paid_last_three_months"],
        "paid_by_month": ", ".join(
            f"{month}: {money(amount, now['currency'])}"
            for month, amount in now["paid_by_month"].items()
        ),
        **part_of(visit, "payments", payments[::-1]),
        **await _prices(visit, await visit.ask(API.account_prices, account=account_id)),
    }


async def statement(visit: Visit) -> Context:
    """A month of it."""
    shown = await _account(visit, "Billing")
    month = visit.request.path_params["month"]
    found = await _statement(visit, shown["account"]["id"], month, MOST_LINES + 1)
    more = len(found["usage"]) > MOST_LINES
    return {**shown, "found": found, "lines": found["usage"][:MOST_LINES], "more": more}


async def _statement(visit: Visit, account: str, month: str, lines: int) -> Record:
    """With so many lines of its usage."""
    query = {"limit": lines}
    found: Record = await visit.ask(API.statement, account=account, month=month, query=query)
    return found


MOST_LINES = 500


async def statement_csv(visit: Visit) -> Response:
    """As CSV."""
    account, month = (visit.request.path_params[name] for name in ("account", "month"))
    found = await visit.ask(API.statement, account=account, month=month)
    lines = map(str.encode, csv_lines(statement_lines(found)))
    return await in_parts(lines, 200, as_file(f"statement-{found['month']}.csv"), "text/csv")


async def members(visit: Visit) -> Context:
    """Who may log in to it."""
    shown = await _account(visit, "Members")
    return {**shown, **part_of(visit, "users", await _users(visit)), "added": None}


async def account_notices(visit: Visit) -> Context:
    """What it is told."""
    shown = await _account(visit, "Notices")
    found = (await visit.ask(API.account_notices, account=shown["account"]["id"]))["notices"]
    return {**shown, **part_of(visit, "notices", found[::-1])}


async def manage(visit: Visit) -> Context:
    """What only operators change of an account."""
    return await _account(visit, "Manage")


async def set_account(visit: Visit) -> None:
    """What is left empty is the settings' again."""
    body = {name: visit.form.get(name, "").strip() or None for name in ACCOUNT_FIELDS}
    await visit.do(API.set_account, body, account=visit.request.path_params["account"])


def _on_account(operation: Operation, *fields: str) -> Action:
    async def action(visit: Visit) -> None:
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
