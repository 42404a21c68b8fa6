"""Count the items of an output that cost more than their tokens."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from redbtc.meter.answers import MAX_OUTPUT_ITEMS, OutputItem, name_in
from redbtc.meter.usage_fields import with_svg
from redbtc.usage import Usage, UsagePart

# Items that cost money by themselves, or run in containers that do.
PAID_TYPES = (
    *("web_search_call", "file_search_call", "code_interpreter_call", "shell_call"),
    *("local_shell_call", "shell_call_output"),
)


class PaidItems(Struct):
    """The paid items that an answer has named, at most MAX_OUTPUT_ITEMS. An item without an id is a
    new one."""

    searches: dict[Any, bool] = {}  # web searches by id; whether they cost money
    file_searches: set[Any] = set()  # ids
    svgs: dict[Any, Any] = {}  # usage of the authors of SVGs, by the item's id
    # The ids of containers in which code ran. No usage reports containers.
    containers: dict[str, None] = {}

    def note(self, item: OutputItem) -> None:
        """Note an item whose type is in PAID_TYPES, or that has the usage of an SVG's author."""
        name = name_in(item.id)
        if item.svg_usage is not None and len(self.svgs) < MAX_OUTPUT_ITEMS:
            self.svgs[name or len(self.svgs)] = item.svg_usage
        calls = len(self.searches) + len(self.file_searches) + len(self.containers)
        if item.type not in PAID_TYPES or calls >= MAX_OUTPUT_ITEMS:
            return
        if item.type == "web_search_call":
            self.searches[name or len(self.searches)] = item.is_paid_search
        elif item.type == "file_search_call":
            self.file_searches.add(name or len(self.file_searches))
        else:
            self.containers.update((each, None) for each in item.used_containers() if name_in(each))

    @property
    def web_searches(self) -> int:
        """The number of paid web searches."""
        return sum(self.searches.values())

    def add_calls(self, used: Usage, parts: list[UsagePart]) -> Usage:
        """Return a response's usage with the tool calls in its output, which no usage reports."""
        used = msgspec.structs.replace(
            used,
            web_searches=self.web_searches or None,
            file_searches=len(self.file_searches) or None,
        )
        parts[0] = parts[0]._replace(usage=used)
        return used

    def add_authors(self, used: Usage | None, parts: list[UsagePart]) -> Usage | None:
        """Return the usage with that of the authors of SVGs added, and append theirs to `parts`."""
        for svg in self.svgs.values():
            used = with_svg(used, parts, svg)
        return used
