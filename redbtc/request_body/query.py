"""Read query strings, and keep the fields that are forwarded."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import parse_qsl, quote, urlencode

from redbtc.refusals import Refusal

MAX_QUERY_FIELDS = 100
VALUE = re.compile(r"[\w.:=+~,-]{1,256}", re.ASCII)  # no '%', which could be decoded twice


class Query:
    """The fields of a stored response's query that are forwarded. Empty ones and others, such as
    the `api-version` that tools add by themselves, are dropped without a refusal."""

    def __init__(self, given: bytes, allowed: Collection[str]) -> None:
        """Read the fields of a query. Raises Refusal for one with more than MAX_QUERY_FIELDS
        fields, and for a forwarded value that could be read in more than one way."""
        if given.count(b"&") >= MAX_QUERY_FIELDS:
            raise Refusal("invalid_request", f"The query has more than {MAX_QUERY_FIELDS} fields.")
        fields = parse_qsl(given.decode("latin-1"), errors="replace")
        self._fields = [(name, value) for name, value in fields if name in allowed]
        for name, value in self._fields:
            if not VALUE.fullmatch(value):
                message = (
                    f"'{name}' in the query may contain only letters, digits and '._:=+~,-', at "
                    "most 256 characters."
                )
                raise Refusal("invalid_request", message, param=name)

    def values(self, name: str) -> list[str]:
        """Return all values of a field."""
        return [value for each, value in self._fields if each == name]

    def encoded(self) -> bytes:
        """Return the query for the upstream."""
        return urlencode(self._fields, safe="[]", quote_via=quote).encode()
