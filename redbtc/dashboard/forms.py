"""Forms that browsers send: their fields, and the rule that each form is processed once."""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from urllib.parse import parse_qsl

from starlette.requests import Request

from redbtc.admin.http import check_fields, whole_body
from redbtc.errors import UserError

MAX_FORM_BYTES = 64 << 10
MAX_REMEMBERED = 10_000  # tokens of forms that were processed
FORM_TOKEN = re.compile("[0-9a-f]{16}")


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of the form that a request sends. Raises UserError if it is too large or
    has too many fields."""
    check_fields(request.scope["query_string"])
    body = await whole_body(request, MAX_FORM_BYTES)
    check_fields(body)
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


class ProcessedForms:
    """The forms that were processed since the gateway started. Each form on a page has a random
    token, so that reloading the page or clicking twice does not, say, create a second key."""

    def __init__(self) -> None:
        self._processed: OrderedDict[tuple[str, str], None] = OrderedDict()

    @contextlib.contextmanager
    def once(self, user_id: str, token: str) -> Iterator[None]:
        """Process a form, and remember it if that succeeds. Raises UserError if it was processed
        before. A token that no page contains is ignored."""
        if not FORM_TOKEN.fullmatch(token):
            yield
            return
        form = user_id, token
        if form in self._processed:
            raise UserError("this form was already submitted; keys and links are shown only once")
        self._processed[form] = None
        if len(self._processed) > MAX_REMEMBERED:
            self._processed.popitem(last=False)
        try:
            yield
        except BaseException:
            self._processed.pop(form, None)
            raise
