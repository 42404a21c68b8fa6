"""Read the tools of a body: the models and extras that they can use, and what they name."""

from __future__ import annotations

from collections import deque

import msgspec
from msgspec import Struct, field

from redbtc.meter.answers import MAX_NAME
from redbtc.rates import EXTRAS
from redbtc.refusals import Refusal
from redbtc.request_body.contents import ToolUse, add_models, check_models
from redbtc.request_body.facts import DEFAULT_IMAGE_MODEL, IMAGE_MEMBERS, UNNAMED, type_of
from redbtc.request_body.member_references import MAX_NESTING, MemberReferences
from redbtc.request_body.pictures import PictureCounter
from redbtc.request_body.pieces import Pieces
from redbtc.request_body.strict_json import (
    NULL,
    PACE,
    Members,
    check_letters,
    is_list,
    is_text,
    members_in,
    read_list,
    string_in,
)
from redbtc.steps import Steps

MAX_TOOLS = 4_000  # nested ones included; OpenAI allows 128, MCP servers have some hundreds
TOOL_MEMBERS = IMAGE_MEMBERS | {
    *("type", "model", "svg", "tools", "function", "container", "environment"),
}
# The extras of the upstream's own tools, by the beginning of their types: some types are dated,
# such as web_search_preview_2025_03_11.
EXTRAS_OF_TOOLS = {
    "web_search": EXTRAS["web_search"],
    "file_search": EXTRAS["file_search"],
    "code_interpreter": EXTRAS["container"],
    "shell": EXTRAS["container"],
}
PAID_TOOLS = tuple(EXTRAS_OF_TOOLS)
NO_NEW_CONTAINER = ("local", "container_reference")  # types of a shell's environment


class ToolReader(Struct):
    """Reads the lists of tools in a body, nested ones included, and notes their use. If `finder` is
    None, no member of the body can name a stored object; if `pictures` is None, none can be a
    picture."""

    pieces: Pieces
    use: ToolUse
    finder: MemberReferences | None
    pictures: PictureCounter | None
    # The lists to read, with their depth and whether requests that build on this one inherit them.
    waiting: deque[tuple[msgspec.Raw, int, bool]] = field(default_factory=deque)

    def read(self, given: msgspec.Raw, depth: int, inheritable: bool) -> Steps[None]:
        """Read one of the waiting lists, in small steps. Raises Refusal."""
        if depth >= MAX_NESTING:
            message = f"Tools are nested more than {MAX_NESTING} levels deep."
            raise Refusal("invalid_request", message, param="tools")
        for part in self.pieces.parts(given) if is_list(given) else ():
            checked_members = None if self.finder else TOOL_MEMBERS
            tools = yield from read_list(self.pieces, part, TOOL_MEMBERS, checked_members)
            self.count(len(tools))
            for number, tool in enumerate(tools):
                if "type" not in tool:  # `read_list` may not have checked such a tool
                    check_letters(tool, TOOL_MEMBERS)
                kind = type_of(tool)
                if kind.startswith("image_generation"):
                    yield from self._note_image_tool(tool, inheritable)
                elif kind.startswith(PAID_TOOLS):
                    yield from self._note_paid_tool(tool, kind, inheritable)
                if "tools" in tool:
                    self.waiting.append((tool["tools"], depth + 1, inheritable))
                if self.finder:
                    yield from self.finder.find_in_tool(tool)
                if number % PACE == 0:
                    yield

    def count(self, tools: int) -> None:
        """Add to the number of tools. Raises Refusal for too many."""
        self.use.count += tools
        if self.use.count > MAX_TOOLS:
            message = f"The body has more than {MAX_TOOLS} tools."
            raise Refusal("invalid_request", message, param="tools")

    def _note_paid_tool(self, tool: Members, kind: str, inheritable: bool) -> Steps[None]:
        """Note the extra that a tool can use. A container that the tool names is not a new one, nor
        is the client's own machine."""
        if kind.startswith("code_interpreter") and is_text(tool.get("container", NULL)):
            return
        if kind.startswith("shell"):
            given = tool.get("environment", NULL)
            if given == NULL:
                return
            environment = yield from members_in(self.pieces.parts(given))
            check_letters(environment, TOOL_MEMBERS)
            if type_of(environment) in NO_NEW_CONTAINER:
                return
        bit = next(EXTRAS_OF_TOOLS[start] for start in PAID_TOOLS if kind.startswith(start))
        self.use.extras |= bit
        self.use.inheritable_extras |= bit if inheritable else 0

    def _note_image_tool(self, tool: Members, inheritable: bool) -> Steps[None]:
        yield from self.note_author(tool, inheritable)
        if self.pictures:
            yield from self.pictures.count_in(tool, ("input_image_mask",))
        model = string_in(tool.get("model", NULL)) or DEFAULT_IMAGE_MODEL
        self._note_model(model, True, inheritable)

    def note_author(self, drawing: Members, inheritable: bool) -> Steps[None]:
        """Note the author of an SVG, if `drawing`, an image tool or the body of an image request,
        asks for one."""
        given, author = drawing.get("svg", NULL), ""
        if given != NULL:
            svg = yield from members_in(self.pieces.parts(given))
            check_letters(svg, TOOL_MEMBERS)
            author = string_in(svg.get("model", NULL))
        if author or string_in(drawing.get("output_format", NULL)).lower() == "svg":
            self._note_model(author or UNNAMED, False, inheritable)

    def _note_model(self, model: str, images: bool, inheritable: bool) -> None:
        if len(model) > MAX_NAME:
            message = f"The model of a tool has more than {MAX_NAME} characters."
            raise Refusal("invalid_request", message, param="tools")
        use = self.use
        for models in (use.models, use.inheritable_models) if inheritable else (use.models,):
            check_models(add_models(models, {model: images}))
