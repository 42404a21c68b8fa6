"""Describe the values that a Scanner keeps of a JSON text."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Literal

TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
SIMPLE_VALUE = TEXT + rb'|[^\s"\[\]{},:]++|[\[{][^"\[\]{}]*+(?:%b[^"\[\]{}]*+)*+[\]}]' % TEXT
SKIPPED_RUN = rb'(?:[\s,]*+"(?!(?:%b)")[^"\\]*+"\s*+:\s*+(?:%b)(?=[\s,}]))*+'
KeptOfString = Literal["short", "length", "head"]


class Node:
    """Describes the parts of a value that are kept: the members of an object that are named here;
    all elements of a list, each as `elements` says; a whole string of up to MAX_STRING bytes
    ("short"), or only its length ("length") or its beginning ("head")."""

    def __init__(
        self,
        members: dict[str, Node] | None = None,
        elements: Node | None = None,
        strings: KeptOfString = "short",
        recursive: bool = False,
        whole: bool = False,
    ) -> None:
        """Keep these members or elements. `recursive`: the value can contain values of the same
        node. `whole`: the value is dropped if its end is missing."""
        self.elements = elements
        self.strings = strings
        self.recursive = recursive
        self.whole = whole
        self.members: dict[bytes, Node] = {}
        self.add_members(members or {})

    def add_members(self, members: dict[str, Node]) -> None:
        """Keep these members as well."""
        self.members |= {name.encode(): node for name, node in members.items()}

    @cached_property
    def run(self) -> re.Pattern[bytes]:
        """The pattern of a run of members that are not kept."""
        names = b"|".join(re.escape(name) for name in self.members)
        return re.compile(SKIPPED_RUN % (names, SIMPLE_VALUE), re.DOTALL)

    def keeps(self, bracket: int) -> bool:
        """Return whether anything is kept of a list or an object, which begins with `bracket`."""
        return bool(self.members) if bracket == 0x7B else self.elements is not None
