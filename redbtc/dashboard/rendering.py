"""Pages drawn from templates."""

from __future__ import annotations

import asyncio
import secrets
import shlex
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import jinja2.meta
from starlette.responses import Response

from redbtc.admin.actors import Invalid
from redbtc.admin.http import DEFAULT_STATUS, STATUS, retry_after
from redbtc.billing.document_files import DOCUMENT_TITLES
from redbtc.billing.documents import Documents
from redbtc.dashboard.formats import (
    aligned,
    browser,
    count,
    counted,
    date_name,
    duration,
    exact,
    failure,
    is_moment,
    literal,
    month_name,
    percent,
    size,
    utc,
)
from redbtc.dashboard.sessions import PAGE_HEADERS
from redbtc.dashboard.uptime_chart import percent_up
from redbtc.errors import UserError
from redbtc.money import money
from redbtc.slices import with_turns

DASHBOARD_FOLDER = Path(__file__).resolve().parent
PageVariables = dict[str, Any]  # the variables of a template


class Loader(jinja2.FileSystemLoader):
    """A loader that compiles a template together with the templates that it names, so that drawing
    a page compiles nothing."""

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
    """Return the templates' environment, which escapes all values."""
    found = jinja2.Environment(
        loader=Loader(DASHBOARD_FOLDER / "templates"),
        autoescape=True,
        auto_reload=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        money=money, exact=exact, count=count, size=size, utc=utc, duration=duration
    )
    found.filters.update(counted=counted, percent=percent, month_name=month_name)
    found.filters.update(aligned=aligned, literal=literal, shell=shlex.quote, browser=browser)
    found.filters.update(failure=failure, date_name=date_name, percent_up=percent_up)
    found.tests["moment"] = is_moment
    found.globals["once"] = lambda: secrets.token_hex(8)
    return found


class Renderer:
    """Renders pages and error pages from the templates, one large page at a time. Each page has
    links to the documents that are shown."""

    def __init__(self, currency: str, documents: Documents) -> None:
        self._environment = environment()
        self._documents = documents
        self._compiled: set[str] = set()
        self._drawing = asyncio.Lock()
        self._defaults: PageVariables = {
            "session": None,
            "form": {},
            "wrong_field": "",
            "problem": "",
            "done": False,
            "here": "",
            "currency": currency,
        }

    async def render(self, template: str, variables: PageVariables, status: int = 200) -> Response:
        """Return a page with this status. Pages are drawn one after the other."""
        async with self._drawing:
            if template not in self._compiled:  # compiling blocks for longer than drawing
                await asyncio.to_thread(self._environment.get_template, template)
                self._compiled.add(template)
            links = {f"/{name}": DOCUMENT_TITLES[name] for name in self._documents.names()}
            body = await draw(
                self._environment.get_template(template),
                {**self._defaults, "document_links": links, **variables},
            )
        return Response(body, status, PAGE_HEADERS, media_type="text/html; charset=utf-8")

    async def render_error(
        self, template: str, error: UserError, variables: PageVariables
    ) -> Response:
        """Return a page that says why a request was refused."""
        status = error_status(error)
        response = await self.render(template, {**variables, **explanation(error)}, status)
        response.headers.update(retry_after(error))
        return response


def error_status(error: UserError) -> int:
    """Return the HTTP status that reports an error."""
    return STATUS.get(type(error), DEFAULT_STATUS)


async def draw(template: jinja2.Template, variables: PageVariables) -> bytes:
    """Return a page as UTF-8, giving other tasks turns of the event loop while it is drawn."""
    parts = [part async for part in with_turns(template.generate(variables))]
    return "".join(parts).encode("utf-8", "replace")


def sentence(text: str) -> str:
    """Return an error message as a sentence. A first word that is a name, such as monthly_budget,
    stays as it is."""
    first = text.partition(" ")[0]
    return f"{text[:1].upper() if first.isalpha() else text[:1]}{text[1:]}."


def explanation(error: UserError) -> PageVariables:
    """Return the message of an error, and the name of the wrong field if it is about one."""
    if isinstance(error, Invalid) and error.field:
        what = error.what.removesuffix(", got `str`")
        if what.startswith("Object missing"):
            what = f"{error.field} is required"
        return {"problem": sentence(what), "wrong_field": error.field}
    return {"problem": sentence(str(error))}
