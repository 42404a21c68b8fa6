"""Read the facts and the references of a JSON body in small steps."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Set

import msgspec

from redbtc.locations import MAX_MODELS
from redbtc.meter.answers import MAX_NAME
from redbtc.meter.scanner import NOT_JSON
from redbtc.rates import EXTRAS
from redbtc.refusals import Refusal
from redbtc.request_body.facts import (
    DEFAULT_IMAGE_MODEL,
    DRAWN,
    PART,
    PARTS,
    PICTURES,
    SEARCHES,
    UNNAMED,
    InputItem,
    kind_of,
    reference_in,
)
from redbtc.request_body.pieces import Pieces, Steps
from redbtc.request_body.references import (
    ESCAPED,
    MEMBER,
    Reference,
    References,
    named_in,
    refuse_hidden,
)
from redbtc.request_body.strict_json import (
    NOTHING,
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

PICTURE = b"image_url"
CONTENTS = ("content", "output")  # members of an item that can hold pictures
TOOL_NAMES = {"type", "model", "svg", "tools", "function", "container", "environment"} | DRAWN
# How the types of the upstream's own tools begin, with the bits of what they use; there are dated
# ones, such as web_search_preview_2025_03_11.
BITS_OF_TOOLS = {
    "web_search": EXTRAS["web_search"],
    "file_search": EXTRAS["file_search"],
    "code_interpreter": EXTRAS["container"],
    "shell": EXTRAS["container"],
}
STARTS_OF_TOOLS = tuple(BITS_OF_TOOLS)
NO_NEW_CONTAINER = ("local", "container_reference")  # types of a shell's environment
ITEM_NAMES = {"id", "type", "status", "role", "content", "output", "encrypted_content", "tools"}
# Only items with one of these members are checked; most histories have none.
TELLING = {"id", "ID", "Id", "iD", "tools", "Tools", "TOOLS"}
MAX_NESTING = 8  # levels of tools within tools

MAX_ITEMS = 20_000  # of the input; the history of a day's work has 2,000
MAX_TOOLS = 4_000  # nested ones included; OpenAI allows 128, MCP servers have some hundreds


def check_models(models: dict[str, bool]) -> None:
    """Raise Refusal for more than MAX_MODELS models."""
    if len(models) > MAX_MODELS:
        message = f"The tools use more than {MAX_MODELS} different models."
        raise Refusal("invalid_request", message, param="tools")


def add_models(models: dict[str, bool], more: dict[str, bool]) -> dict[str, bool]:
    """Add `more` to `models`, and return these. One that makes pictures still does if it is named
    as an SVG's author as well."""
    for model, images in more.items():
        models[model] = images or models.get(model, False)
    return models


class BodyReader:
    """One pass over a body's members, its input and its tools, which collects the references, ids,
    models and pictures in them."""

    def __init__(self, pieces: Pieces, members: Members) -> None:
        self.named = References()
        self.tools = self._items = 0
        self.models: dict[str, bool] = {}
        self.durable: dict[str, bool] = {}
        self.extras = self.lasting_extras = 0  # of the upstream's tools: bits of EXTRAS
        self.searches = False  # the request as a whole is one search of the web
        self.pictures = self.picture_bytes = 0
        self.countable = True  # whether the pictures can be counted by their places
        self._pieces = pieces
        self._members = members
        self._names = False  # whether any member may name a stored object
        self._shows = False  # whether any member may be a picture
        # Lists of tools to read, with their depth and whether they are part of the input.
        self._offers: deque[tuple[msgspec.Raw, int, bool]] = deque()

    def steps(self) -> Steps[None]:
        """Read the body in small steps. Raises Refusal for a body that can't be read, is too large,
        or has a name in a disguised spelling."""
        members = self._members
        for piece in self._pieces.all():
            escaped = yield from refuse_hidden(piece)
            self._names = self._names or MEMBER.search(piece) is not None
            self._shows = self._shows or escaped or PICTURE in piece
            if self._pieces.cut:
                yield
        if "input" in members:
            yield from self._read_input(members["input"])
        if "tools" in members:
            self._offers.append((members["tools"], 0, False))
        while self._offers:
            yield from self._read_tools(*self._offers.popleft())
        if "svg" in members or "output_format" in members:
            yield from self._note_author(members, durable=False)
        if members.get(SEARCHES, NULL) != NULL:
            self.searches = True
            self.extras |= EXTRAS["web_search"]
        if self._names:
            yield from self._name_members(members)
        if self._shows:
            yield from self._count_messages(members.get("messages", NULL))
            yield from self._count_pictures(members, PICTURES)
            if not self.countable:
                yield from self._count_names()

    def _read_input(self, given: msgspec.Raw) -> Steps[None]:
        if not (given == NULL or bytes(memoryview(given)[:1]) in (b'"', b"[")):
            raise Refusal("invalid_request", "'input' must be a string or an array.", param="input")
        for part in self._pieces.parts(given) if is_list(given) else ():
            telling = None if self._names or self._shows else TELLING
            objects = yield from read_list(self._pieces, part, ITEM_NAMES, telling)
            self._count_items(objects)
            for number, item in enumerate(objects):
                if "id" in item or "tools" in item:
                    self._note_item(item)
                if "outputs" in item:
                    yield from self._count_outputs(item)
                if self._names:
                    yield from self._name_item(item)
                if self._shows:
                    yield from self._count_pictures(item, CONTENTS)
                if number % PACE == 0:
                    yield

    def _count_items(self, items: list[Members]) -> None:
        self._items += len(items)
        if self._items > MAX_ITEMS:
            message = f"The input has more than {MAX_ITEMS} items."
            raise Refusal("invalid_request", message, param="input")

    def _note_item(self, item: InputItem) -> None:
        if "id" in item and is_text(item["id"]):
            object_id = string_in(item["id"])
            if name := reference_in(item, self._pieces):
                self.named.add(Reference(name, object_id))
                if is_text(item.get("result", NULL)) and kind_of(item) == "image_generation_call":
                    self.pictures += 1
                    self.picture_bytes += self._pieces.size(item["result"])
            else:
                self.named.choose(object_id[: MAX_NAME + 1])  # a longer one is never learned
        if "tools" in item and kind_of(item) != "mcp_list_tools":  # that one only reports tools
            self._offers.append((item["tools"], 0, True))

    def _count_outputs(self, item: InputItem) -> Steps[None]:
        """Count the pictures in the output of a code interpreter."""
        made = "id" in item and reference_in(item, self._pieces) == "input"
        if made and is_list(item["outputs"]) and kind_of(item) == "code_interpreter_call":
            for text in self._pieces.parts(item["outputs"]):
                with contextlib.suppress(*NOT_JSON):
                    pictures = [each.url for each in PARTS.decode(text) if is_text(each.url)]
                    self.pictures += len(pictures)
                    self.picture_bytes += sum(map(self._pieces.size, pictures))
                yield

    def _name_item(self, item: InputItem) -> Steps[None]:
        kind = kind_of(item)
        skipped = {"id", "type"} if kind == "item_reference" else set()
        yield from self._name_beside(item, skipped | WORDS_OF.get(kind, set()))

    def _read_tools(self, given: msgspec.Raw, depth: int, durable: bool) -> Steps[None]:
        if depth >= MAX_NESTING:
            message = f"Tools are nested more than {MAX_NESTING} levels deep."
            raise Refusal("invalid_request", message, param="tools")
        for part in self._pieces.parts(given) if is_list(given) else ():
            telling = None if self._names else TOOL_NAMES
            tools = yield from read_list(self._pieces, part, TOOL_NAMES, telling)
            self._count_tools(tools)
            for number, tool in enumerate(tools):
                if "type" not in tool:  # unless it has another name of these, it is not checked yet
                    check_letters(tool, TOOL_NAMES)
                kind = kind_of(tool)
                if kind.startswith("image_generation"):
                    yield from self._note_painter(tool, durable)
                elif kind.startswith(STARTS_OF_TOOLS):
                    yield from self._note_tool(tool, kind, durable)
                if "tools" in tool:
                    self._offers.append((tool["tools"], depth + 1, durable))
                if self._names:
                    yield from self._name_tool(tool)
                if number % PACE == 0:
                    yield

    def _count_tools(self, tools: list[Members]) -> None:
        self.tools += len(tools)
        if self.tools > MAX_TOOLS:
            message = f"The body has more than {MAX_TOOLS} tools."
            raise Refusal("invalid_request", message, param="tools")

    def _name_tool(self, tool: Members) -> Steps[None]:
        yield from self._name_beside(tool, {"headers", "function", "tools", *TOOL_SCHEMAS})
        yield from self._name_within(tool, "function")

    def _note_tool(self, tool: Members, kind: str, durable: bool) -> Steps[None]:
        """Note what a tool can use. A container that is named, and its own machine, are not new."""
        if kind.startswith("code_interpreter") and is_text(tool.get("container", NULL)):
            return
        if kind.startswith("shell"):
            given = tool.get("environment", NULL)
            if given == NULL:
                return
            environment = yield from members_in(self._pieces.parts(given))
            check_letters(environment, TOOL_NAMES)
            if kind_of(environment) in NO_NEW_CONTAINER:
                return
        bit = next(BITS_OF_TOOLS[start] for start in STARTS_OF_TOOLS if kind.startswith(start))
        self.extras |= bit
        self.lasting_extras |= bit if durable else 0

    def _note_painter(self, tool: Members, durable: bool) -> Steps[None]:
        yield from self._note_author(tool, durable)
        if self._shows:
            yield from self._count_pictures(tool, ("input_image_mask",))
        model = string_in(tool.get("model", NULL)) or DEFAULT_IMAGE_MODEL
        self._note_model(model, True, durable)

    def _note_author(self, drawing: Members, durable: bool) -> Steps[None]:
        """Note the author of an SVG, if `drawing`, an image tool or the body of an image request,
        asks for one."""
        given, author = drawing.get("svg", NULL), ""
        if given != NULL:
            svg = yield from members_in(self._pieces.parts(given))
            check_letters(svg, TOOL_NAMES)
            author = string_in(svg.get("model", NULL))
        if author or string_in(drawing.get("output_format", NULL)).lower() == "svg":
            self._note_model(author or UNNAMED, False, durable)

    def _note_model(self, model: str, images: bool, durable: bool) -> None:
        if len(model) > MAX_NAME:
            message = f"The model of a tool has more than {MAX_NAME} characters."
            raise Refusal("invalid_request", message, param="tools")
        for models in (self.models, self.durable) if durable else (self.models,):
            check_models(add_models(models, {model: images}))

    # Pictures

    def _count_messages(self, given: msgspec.Raw) -> Steps[None]:
        for part in self._pieces.parts(given) if is_list(given) else ():
            try:
                messages = yield from read_list(self._pieces, part, {"content"}, None)
            except Refusal:
                self.countable = False
                return
            self._count_items(messages)
            for message in messages:
                yield from self._count_pictures(message, CONTENTS)
            yield

    def _count_names(self) -> Steps[None]:
        """Count every `image_url` in the body, and every escape, as a picture, and all bytes as
        text. For bodies with malformed lists, which some upstreams ignore."""
        self.pictures = self.picture_bytes = 0
        for piece in self._pieces.all():
            self.pictures += piece.count(PICTURE)
            for number, _ in enumerate(ESCAPED.finditer(piece)):
                self.pictures += 1
                if number % 256 == 0:
                    yield
            yield

    def _count_pictures(self, item: Members, names: Iterable[str]) -> Steps[None]:
        """Count the pictures in members of an object: lists of parts, or one part."""
        for name in names:
            given = item.get(name, NOTHING)
            single = bytes(memoryview(given)[:1]) == b"{"
            for text in self._pieces.parts(given) if single or is_list(given) else ():
                try:
                    parts = [PART.decode(text)] if single else PARTS.decode(text)
                except NOT_JSON:
                    self.countable = False
                    return
                pictures = [each.image_url for each in parts if each.image_url]
                self.pictures += len(pictures)
                self.picture_bytes += sum(map(self._pieces.size, pictures))
                yield

    # References by the names of members

    def _name_members(self, members: Members) -> Steps[None]:
        skipped = {"metadata", "client_metadata", "input", "tools", "functions", *SCHEMAS}
        yield from self._name_beside(members, skipped)
        for name in SCHEMAS:
            yield from self._name_within(members, name)
        functions = members.get("functions", NULL)
        for part in self._pieces.parts(functions) if is_list(functions) else ():
            found = yield from read_list(self._pieces, part, set(), None)
            self._count_tools(found)
            for function in found:
                yield from self._name_beside(function, TOOL_SCHEMAS)

    def _name_within(self, members: Members, name: str, depth: int = 0) -> Steps[None]:
        """Note references in a member that holds a schema, but not in the schema itself, which is
        its author's own text."""
        value = members.get(name, NULL)
        if bytes(memoryview(value)[:1]) != b"{":
            yield from self._name_beside({name: value}, set())
            return
        if depth >= MAX_NESTING:
            message = f"'{name}' is nested more than {MAX_NESTING} levels deep."
            raise Refusal("invalid_request", message, param=name)
        inner = yield from members_in(self._pieces.parts(value))
        for deeper in ("format", "json_schema"):
            if deeper in inner:
                yield from self._name_within(inner, deeper, depth + 1)
        yield from self._name_beside(inner, {"schema", "format", "json_schema"} | TOOL_SCHEMAS)

    def _name_beside(self, members: Members, skipped: Set[str]) -> Steps[None]:
        """Note references in all members except `skipped`. "tools" and "functions" are skipped only
        if they are lists, whose elements are read one by one."""
        for name, value in members.items():
            if name not in skipped or (name in ("tools", "functions") and not is_list(value)):
                text = b"%b:%b" % (msgspec.json.encode(name), value)
                yield from named_in(text, self._pieces, self.named)


SCHEMAS = ("text", "response_format")
TOOL_SCHEMAS = {"parameters", "output_schema"}
WORDS_OF = {  # by an item's type, the members that hold a model's or a server's own text
    "tool_search_call": {"arguments"},
    "local_shell_call": {"action"},
    "shell_call": {"action"},
    "mcp_list_tools": {"tools"},
    "additional_tools": {"tools"},
    "tool_search_output": {"tools"},
}
