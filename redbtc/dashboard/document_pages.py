"""The public pages of the operator's documents, /terms and /privacy, and the page on which an owner
accepts them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, NamedTuple

from starlette.responses import Response

from redbtc.admin.api import API
from redbtc.billing.document_files import DOCUMENT_TITLES, date_text
from redbtc.billing.documents import Documents, Published
from redbtc.dashboard.markdown import RenderedMarkdown, render_markdown
from redbtc.dashboard.page_request import PageRequest, redirect_to_next
from redbtc.dashboard.rendering import Renderer
from redbtc.dashboard.sessions import SAFE
from redbtc.errors import UserError

MAX_RENDERED = 16  # versions whose HTML is kept


class VersionLink(NamedTuple):
    """A version of a document as pages name it."""

    title: str
    name: str
    version: str
    date: str  # from which it applies
    is_coming: bool

    @property
    def url(self) -> str:
        """The URL at which it can be read."""
        return f"/{self.name}?version={self.version}"


def link_to(each: Published, now: int) -> VersionLink:
    """Return a version as pages name it at a time."""
    title, date = DOCUMENT_TITLES[each.name], date_text(each.effective_at)
    return VersionLink(title, each.name, each.version, date, each.effective_at > now)


class DocumentPages:
    """The pages of the documents. Each version is rendered once."""

    def __init__(self, api: API, renderer: Renderer) -> None:
        self._api = api
        self._renderer = renderer
        self._rendered: OrderedDict[tuple[str, str], RenderedMarkdown] = OrderedDict()
        self._rendering = asyncio.Lock()

    @property
    def _documents(self) -> Documents:
        return self._api.billing.documents

    async def show(self, name: str, version: str | None) -> Response | None:
        """Return the page of a document, which everybody may read: of the version in force, or of
        another one. Return None if that does not exist."""
        documents, now = self._documents, self._api.billing.store.time()
        versions, current = documents.versions(name), documents.in_force(name)
        found = {each.version: each for each in versions}
        shown = found.get(current.version if version is None else version)
        if shown is None:
            return None
        rendered = await self._render(shown)
        variables = {
            "document": rendered,
            "shown": link_to(shown, now),
            "current": link_to(current, now),
            "others": [link_to(each, now) for each in versions[::-1] if each is not shown],
        }
        return await self._renderer.render("document.html", variables)

    async def _render(self, each: Published) -> RenderedMarkdown:
        """Return a version as HTML, one after the other."""
        key = each.name, each.version
        async with self._rendering:
            if key not in self._rendered:
                text = await self._documents.text(each)
                self._rendered[key] = await asyncio.to_thread(render_markdown, text)
                if len(self._rendered) > MAX_RENDERED:
                    self._rendered.popitem(last=False)
            self._rendered.move_to_end(key)
            return self._rendered[key]

    async def accept(self, page: PageRequest) -> Response:
        """Show an owner what they have yet to accept, or accept it. The form names the versions
        that were shown, so that nobody accepts one that was published meanwhile."""
        error: UserError | None = None
        if page.request.method not in SAFE:
            try:
                await page.do(API.accept_documents, page.fields("terms", "privacy"))
            except UserError as refused:
                error = refused
        missing = self._api.to_accept(page.actor)
        if not missing:
            return redirect_to_next(page.request)
        account = page.session.account_id
        variables: dict[str, Any] = {
            "session": page.session,
            "documents": [link_to(each, page.now) for each in missing],
            "settings_path": f"/dashboard/accounts/{account}/settings",
        }
        if error:
            return await self._renderer.render_error("accept.html", error, variables)
        return await self._renderer.render("accept.html", variables)
