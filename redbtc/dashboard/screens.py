"""A page of the dashboard: its template, its forms, and the role that it requires."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.responses import Response

from redbtc.admin.actors import RANKS, Forbidden, Rank
from redbtc.dashboard.forms import ProcessedForms
from redbtc.dashboard.page_request import PageRequest, redirect
from redbtc.dashboard.parts import PAGE_NUMBER
from redbtc.dashboard.rendering import PageVariables, Renderer
from redbtc.dashboard.sessions import SAFE
from redbtc.errors import NotFound, UserError

Show = Callable[[PageRequest], Awaitable[PageVariables]]
Action = Callable[[PageRequest], Awaitable[PageVariables | Response | None]]
Actions = Mapping[str, Action]
NO_ACTIONS: Actions = {}


class Screen:
    """A page for users with the rank `min_rank` or a higher one. `show` returns the variables of
    its template. `actions` are the forms on it, by the value of their field `do`.

    An action that returns variables has a result that is shown only now, such as a new key: the
    page is the answer. After any other action the browser loads the page again."""

    def __init__(
        self,
        renderer: Renderer,
        processed: ProcessedForms,
        template: str,
        show: Show,
        actions: Actions,
        min_rank: Rank,
    ) -> None:
        self._renderer = renderer
        self._processed = processed
        self._template = template
        self._show = show
        self._actions = actions
        self._min_rank = min_rank

    async def __call__(self, page: PageRequest) -> Response:
        """Answer a request for the page, or process a form on it. Raises UserError."""
        if RANKS[page.actor.rank] < RANKS[self._min_rank]:
            raise Forbidden("you don't have access to this page")
        if page.request.method in SAFE:
            return await self._rendered(page, {"done": "done" in page.query})
        try:
            result = await self._perform(page)
        except (NotFound, Forbidden):
            raise
        except UserError as error:
            return await self._rendered(page, {"form": page.form}, error)
        if isinstance(result, dict):
            return await self._rendered(page, result)
        return result or redirect_to_itself(page)

    async def _perform(self, page: PageRequest) -> PageVariables | Response | None:
        action = self._actions.get(page.form.get("do", ""))
        if action is None:
            raise Forbidden("this page has no such form; reload the page and try again")
        with self._processed.once(page.session.user_id, page.form.get("once", "")):
            return await action(page)

    async def _rendered(
        self, page: PageRequest, variables: PageVariables, error: UserError | None = None
    ) -> Response:
        shown = {**await self._show(page), "session": page.session, **variables}
        if error:
            return await self._renderer.render_error(self._template, error, shown)
        return await self._renderer.render(self._template, shown)


def redirect_to_itself(page: PageRequest) -> Response:
    """Return a response that loads the page again, at the same place of its list, with a message
    that the form was processed."""
    number = page.query.get("page", "")
    return redirect(f"?page={number}&done" if PAGE_NUMBER.fullmatch(number) else "?done")
