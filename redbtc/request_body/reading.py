"""Read a JSON body in small steps: its facts, references, tools and pictures."""

from __future__ import annotations

import msgspec

from redbtc.meter.answers import MAX_NAME
from redbtc.rates import EXTRAS
from redbtc.refusals import Refusal
from redbtc.request_body.contents import BodyContents, BodyRules, ToolUse
from redbtc.request_body.cutting import Cutter
from redbtc.request_body.edits import place_to_edit
from redbtc.request_body.facts import (
    PICTURE_MEMBERS,
    SEARCHES_WEB,
    AnyFacts,
    InputItem,
    facts_in,
    reference_in,
    type_of,
)
from redbtc.request_body.forms import MAX_PICTURE_TOKENS
from redbtc.request_body.member_references import MemberReferences
from redbtc.request_body.pictures import PICTURE_MARK, PictureCounter
from redbtc.request_body.pieces import MAX_PIECE, Buffer, Pieces, check_utf8, read_json
from redbtc.request_body.references import MEMBER, Reference, References, refuse_hidden
from redbtc.request_body.strict_json import (
    NULL,
    PACE,
    RAW_LIST,
    Members,
    is_list,
    is_text,
    members_in,
    read_list,
    read_short,
    string_in,
)
from redbtc.request_body.tools import ToolReader
from redbtc.steps import Steps

PICTURE_LISTS = ("content", "output")  # members of an item that can hold pictures
ITEM_MEMBERS = {"id", "type", "status", "role", "content", "output", "encrypted_content", "tools"}
# Only items with one of these members are checked; most histories have none.
CHECKED_MEMBERS = {"id", "ID", "Id", "iD", "tools", "Tools", "TOOLS"}
CACHE_KEY, ENCRYPTED = "prompt_cache_key", b'"encrypted_content"'
STREAM_FORMATS = (None, "sse", "audio")
MAX_INPUT_ITEMS = 20_000  # of the input; the history of a day's work has 2,000


def read_contents(
    text: Buffer, decoder: msgspec.json.Decoder[AnyFacts], rules: BodyRules
) -> Steps[tuple[BodyContents, Members]]:
    """Read a JSON body in small steps; return what was found, and its members. Raises Refusal for a
    body that can't be read, is too large, or could be read in more than one way."""
    if len(text) > MAX_PIECE:
        pieces: Pieces = yield from Cutter(text).steps()
        members = yield from members_in(pieces.parts(pieces.root))
    else:
        if not text.isascii():
            yield from check_utf8(text)
        pieces, members = read_short(text)
    if pieces.is_cut and pieces.is_stand_in(members.get("stream_options", NULL)):
        raise Refusal("invalid_request", "'stream_options' is too long.", param="stream_options")
    facts = facts_in(members, decoder)
    reader = BodyReader(pieces, members, rules.has_items)
    yield from reader.steps()
    pictures, options = reader.pictures, facts.stream_options
    options_at = None
    if not isinstance(options, msgspec.UnsetType):
        options_at = yield from place_to_edit(text, pieces, members, options)
    contents = BodyContents(
        facts,
        reader.named,
        reader.use,
        pictures.count,
        pictures.bytes,
        len(text) + MAX_PICTURE_TOKENS * pictures.count - pictures.bytes,
        reader.searches_web,
        options_at,
        string_in(members[CACHE_KEY])[:MAX_NAME] if CACHE_KEY in members else "",
        reader.replays,
        reader.prompts,
        characters_of(members.get("input", NULL), pieces) if rules.is_spoken else 0,
    )
    if rules.is_spoken and facts.stream_format not in STREAM_FORMATS:
        message = "'stream_format' must be 'sse' or 'audio'."
        raise Refusal("invalid_request", message, param="stream_format")
    return contents, members


def characters_of(text: msgspec.Raw, pieces: Pieces) -> int:
    """Return how many characters a string has. Raises Refusal if it is very long, and for any other
    value, which an upstream might speak all the same."""
    if bytes(memoryview(text)[:1]) != b'"':
        raise Refusal("invalid_request", "'input' must be a string.", param="input")
    if pieces.size(text) != len(text):  # a string that was cut out
        raise Refusal("invalid_request", "'input' is too long.", param="input")
    return len(string_in(text))


class BodyReader:
    """One pass over a body's members, its input and its tools."""

    def __init__(self, pieces: Pieces, members: Members, has_items: bool) -> None:
        self.named = References()
        self.use = ToolUse()
        self.searches_web = False
        self.replays = False
        self.prompts = 1
        self.pictures = PictureCounter(pieces)
        self._pieces = pieces
        self._members = members
        self._has_items = has_items
        self._items = 0
        self._may_reference = False  # a member may name a stored object
        self._may_show = False  # a member may be a picture

    def steps(self) -> Steps[None]:
        """Read the body in small steps. Raises Refusal."""
        for piece in self._pieces.all():
            escaped = yield from refuse_hidden(piece)
            self._may_reference = self._may_reference or MEMBER.search(piece) is not None
            self._may_show = self._may_show or escaped or PICTURE_MARK in piece
            self.replays = self.replays or ENCRYPTED in piece
            if self._pieces.is_cut:
                yield
        members = self._members
        finder = MemberReferences(self._pieces, self.named) if self._may_reference else None
        pictures = self.pictures if self._may_show else None
        tools = ToolReader(self._pieces, self.use, finder, pictures)
        if "input" in members and self._has_items:
            yield from self._read_input(members["input"], tools, finder)
        if "prompt" in members and is_list(members["prompt"]):
            yield from self._count_prompts(members["prompt"])
        if "tools" in members:
            tools.waiting.append((members["tools"], 0, False))
        while tools.waiting:
            yield from tools.read(*tools.waiting.popleft())
        if "svg" in members or "output_format" in members:
            yield from tools.note_author(members, inheritable=False)
        if members.get(SEARCHES_WEB, NULL) != NULL:
            self.searches_web = True
            self.use.extras |= EXTRAS["web_search"]
        if finder:
            yield from finder.find_in_request(members, self._has_items)
            if "functions" in members:
                yield from self._read_functions(members["functions"], tools, finder)
        if pictures:
            yield from self._count_in_messages(members.get("messages", NULL))
            yield from pictures.count_in(members, PICTURE_MEMBERS)
            if not pictures.is_countable:
                yield from pictures.count_names()

    def _read_input(
        self, given: msgspec.Raw, tools: ToolReader, finder: MemberReferences | None
    ) -> Steps[None]:
        if not (given == NULL or bytes(memoryview(given)[:1]) in (b'"', b"[")):
            raise Refusal("invalid_request", "'input' must be a string or an array.", param="input")
        for part in self._pieces.parts(given) if is_list(given) else ():
            checked_members = None if self._may_reference or self._may_show else CHECKED_MEMBERS
            items = yield from read_list(self._pieces, part, ITEM_MEMBERS, checked_members)
            self._count_items(items)
            for number, item in enumerate(items):
                if "id" in item:
                    self._note_id(item)
                if "tools" in item and type_of(item) != "mcp_list_tools":  # it reports tools only
                    tools.waiting.append((item["tools"], 0, True))
                if "outputs" in item and self._is_code_output(item):
                    yield from self.pictures.count_in_outputs(item["outputs"])
                if finder:
                    yield from finder.find_in_item(item)
                if self._may_show:
                    yield from self.pictures.count_in(item, PICTURE_LISTS)
                if number % PACE == 0:
                    yield

    def _count_items(self, items: list[Members]) -> None:
        self._items += len(items)
        if self._items > MAX_INPUT_ITEMS:
            message = f"The input has more than {MAX_INPUT_ITEMS} items."
            raise Refusal("invalid_request", message, param="input")

    def _note_id(self, item: InputItem) -> None:
        """Note an item's id: as a reference, or as one that the client chose."""
        if not is_text(item["id"]):
            return
        object_id = string_in(item["id"])
        if name := reference_in(item, self._pieces):
            self.named.add(Reference(name, object_id))
            if is_text(item.get("result", NULL)) and type_of(item) == "image_generation_call":
                self.pictures.add([item["result"]])
        else:
            self.named.choose(object_id[: MAX_NAME + 1])  # a longer one is never stored

    def _count_prompts(self, given: msgspec.Raw) -> Steps[None]:
        """Count the prompts of a completion. A list of numbers, which are tokens, is one prompt."""
        count = 0
        for part in self._pieces.parts(given):
            prompts: list[msgspec.Raw] = read_json(part, RAW_LIST)
            for number, each in enumerate(prompts):
                count += bytes(memoryview(each)[:1]) in (b'"', b"[", b"{")
                if number % 1000 == 0:
                    yield
        self.prompts = max(1, count)

    def _is_code_output(self, item: InputItem) -> bool:
        """Return whether an item is one of a code interpreter that the upstream has run."""
        made = "id" in item and reference_in(item, self._pieces) == "input"
        return made and is_list(item["outputs"]) and type_of(item) == "code_interpreter_call"

    def _read_functions(
        self, given: msgspec.Raw, tools: ToolReader, finder: MemberReferences
    ) -> Steps[None]:
        """Find the references in `functions`, an older form of `tools`."""
        for part in self._pieces.parts(given) if is_list(given) else ():
            functions = yield from read_list(self._pieces, part, set(), None)
            tools.count(len(functions))
            for function in functions:
                yield from finder.find_in_function(function)

    def _count_in_messages(self, given: msgspec.Raw) -> Steps[None]:
        """Count the pictures in the messages of a chat."""
        for part in self._pieces.parts(given) if is_list(given) else ():
            try:
                messages = yield from read_list(self._pieces, part, {"content"}, None)
            except Refusal:
                self.pictures.is_countable = False
                return
            self._count_items(messages)
            for message in messages:
                yield from self.pictures.count_in(message, PICTURE_LISTS)
            yield
