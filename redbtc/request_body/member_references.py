"""Find the stored objects that members name, without what is free text of its author: metadata,
schemas, and the arguments and results of tools. (Rule 2 of this package; the items that are named
by their own ids are found in reading.py.)"""

from __future__ import annotations

from collections.abc import Set

import msgspec

from redbtc.refusals import Refusal
from redbtc.request_body.facts import type_of
from redbtc.request_body.pieces import Pieces
from redbtc.request_body.references import References, named_in
from redbtc.request_body.strict_json import NULL, Members, is_list, members_in
from redbtc.steps import Steps

MAX_NESTING = 8  # levels of tools within tools, and of formats within formats
FORMATS = ("text", "response_format")  # members of a request that hold a schema
TOOL_SCHEMAS = {"parameters", "output_schema"}
# Members of a request that are free text, or whose elements are read one by one.
NOT_IN_REQUEST = {"metadata", "client_metadata", "input", "tools", "functions", *FORMATS}
NOT_IN_TOOL = {"headers", "function", "tools", *TOOL_SCHEMAS}
NOT_IN_FORMAT = {"schema", "format", "json_schema", *TOOL_SCHEMAS}
# By an item's type, the members that hold free text of a model or a server.
FREE_TEXT = {
    "tool_search_call": {"arguments"},
    "local_shell_call": {"action"},
    "shell_call": {"action"},
    "mcp_list_tools": {"tools"},
    "additional_tools": {"tools"},
    "tool_search_output": {"tools"},
}


class MemberReferences:
    """Notes the stored objects that members name in `named`."""

    __slots__ = ("_named", "_pieces")

    def __init__(self, pieces: Pieces, named: References) -> None:
        self._pieces = pieces
        self._named = named

    def find_in_request(self, members: Members, has_items: bool) -> Steps[None]:
        """Find the references in the members of a body, without those in its tools and, if its
        input `has_items`, in these."""
        skipped = NOT_IN_REQUEST if has_items else NOT_IN_REQUEST - {"input"}
        yield from self._find_besides(members, skipped)
        for name in FORMATS:
            yield from self._find_in_format(members, name)

    def find_in_item(self, item: Members) -> Steps[None]:
        """Find the references in an item of the input."""
        kind = type_of(item)
        skipped = {"id", "type"} if kind == "item_reference" else set()
        yield from self._find_besides(item, skipped | FREE_TEXT.get(kind, set()))

    def find_in_tool(self, tool: Members) -> Steps[None]:
        """Find the references in a tool, without those in the tools within it."""
        yield from self._find_besides(tool, NOT_IN_TOOL)
        yield from self._find_in_format(tool, "function")

    def find_in_function(self, function: Members) -> Steps[None]:
        """Find the references in an element of `functions`."""
        yield from self._find_besides(function, TOOL_SCHEMAS)

    def _find_in_format(self, members: Members, name: str, depth: int = 0) -> Steps[None]:
        """Find the references in a member that holds a schema, but not in the schema itself."""
        value = members.get(name, NULL)
        if bytes(memoryview(value)[:1]) != b"{":
            yield from self._find_besides({name: value}, set())
            return
        if depth >= MAX_NESTING:
            message = f"'{name}' is nested more than {MAX_NESTING} levels deep."
            raise Refusal("invalid_request", message, param=name)
        inner = yield from members_in(self._pieces.parts(value))
        for deeper in ("format", "json_schema"):
            if deeper in inner:
                yield from self._find_in_format(inner, deeper, depth + 1)
        yield from self._find_besides(inner, NOT_IN_FORMAT)

    def _find_besides(self, members: Members, skipped: Set[str]) -> Steps[None]:
        """Find the references in all members except `skipped`. "tools" and "functions" are skipped
        only if they are lists, whose elements are read one by one."""
        for name, value in members.items():
            if name not in skipped or (name in ("tools", "functions") and not is_list(value)):
                text = b"%b:%b" % (msgspec.json.encode(name), value)
                yield from named_in(text, self._pieces, self._named)
