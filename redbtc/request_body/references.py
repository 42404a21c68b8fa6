"""Find the stored objects that the members in a text name."""

from __future__ import annotations

import re

from msgspec import Struct

from redbtc.meter.nodes import TEXT
from redbtc.meter.scanner import STRING
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer, Pieces
from redbtc.request_body.strict_json import NULL, PACE, check_letters, end_of, members_in, string_in
from redbtc.steps import Steps

FOLDED = ("ſ".encode(), "\N{KELVIN SIGN}".encode())  # case folding makes these s and k

NAMES = (
    rb"previous_response_id|comparison_response_id|conversation|file_ids?|vector_store_ids?|"
    rb"container(?:_id)?|skill_id|tunnel_id|approval_request_id|prompt|audio|voice"
)
CACHE_NAMES = rb"prompt_cache_(?:options|breakpoint)"  # members that have a `ttl`
# The look-ahead rejects most strings at their first letter, which makes the search fast.
MEMBER = re.compile(
    rb'"(?=[acfpstv])(?:('
    + NAMES
    + rb')"\s*:\s*(?=["\[{])|type"\s*:\s*"item_reference"|('
    + CACHE_NAMES
    + rb')"\s*:\s*(?=\{))',
    re.IGNORECASE,
)
HIDDEN = re.compile(
    rb"(?:" + NAMES + rb"|" + CACHE_NAMES + rb"|item_reference|id|type|input)", re.IGNORECASE
)
ID_MEMBER = re.compile(rb'"id"\s*:\s*(' + TEXT + rb")", re.DOTALL | re.IGNORECASE)
# Escapes of ASCII letters and of those in FOLDED, which no writer needs. (With one character before
# the look-ahead the search is much faster than with four.)
ESCAPED = re.compile(rb"\\(?=u(?:00[4-7]|017[fF]|212[aA]))")
TEXT_OR_ID = (b"prompt", b"audio", b"voice")  # members that can also be text
OBJECT_OR_ID = (
    b"conversation",
    b"container",
    *TEXT_OR_ID,
)  # members that can be an object
MAX_REFERENCES = 20_000  # different ones; the input can have as many items
MAX_MENTIONS = 50_000  # repeated ones included
ID_BYTES = 250  # of memory for an id and its reference, without its characters
MAX_HIDDEN = 200  # bytes of the longest name that matters, with all its letters escaped


class Reference(Struct, frozen=True, gc=False):
    """A stored object that a body names, by the member that names it and its id. The object must be
    the account's own; another account's object is refused like one that does not exist. (The
    garbage collector skips references: going through those of many bodies would block the loop.)"""

    name: str
    id: str


class References(Struct):
    """The ids in a body, each once: those of stored objects, and those that the client chose."""

    found: dict[Reference, int] = {}  # with how often each is named
    chosen: set[str] = set()
    long_cache: bool = False  # the body asks for a cache lifetime other than the default
    mentions: int = 0
    characters: int = 0

    def excess(self, size: int) -> int:
        """Return by how many bytes the memory for the ids is larger than `size`."""
        ids = len(self.found) + len(self.chosen)
        return max(0, ID_BYTES * ids + 4 * self.characters - size)

    def choose(self, object_id: str) -> None:
        """Note an id that the client chose."""
        if object_id not in self.chosen:
            self.chosen.add(object_id)
            self.characters += len(object_id)

    def add(self, reference: Reference) -> None:
        """Note a stored object. Raises Refusal if there are too many."""
        self.mentions += 1
        if self.mentions > MAX_MENTIONS:
            message = f"The body refers to stored objects more than {MAX_MENTIONS} times."
            raise Refusal("invalid_request", message)
        if reference not in self.found:
            self.characters += len(reference.id)
        self.found[reference] = self.found.get(reference, 0) + 1
        if len(self.found) > MAX_REFERENCES:
            message = f"The body refers to more than {MAX_REFERENCES} stored objects."
            raise Refusal("invalid_request", message)


def named_in(text: Buffer, pieces: Pieces, named: References) -> Steps[None]:
    """Note the stored objects that members in a text name, at any depth. Raises Refusal."""
    seen: dict[re.Pattern[bytes], set[int]] = {ID_MEMBER: set(), STRING: set()}
    for piece in pieces.within(text, set()):
        done = {ID_MEMBER: 0, STRING: 0}  # by pattern, the offset up to which it was searched for
        for match in MEMBER.finditer(piece):
            start, kind = match.end(), piece[match.end() : match.end() + 1]
            name = (match[1] or b"").lower()
            if match[2]:
                yield from note_lifetime(piece, start, pieces, named)
            elif not name:  # an "item_reference" that is not among the items
                named.add(Reference("item_reference", ""))
            elif kind == b'"':
                value = STRING.match(piece, start)
                if value and name not in TEXT_OR_ID:
                    yield from note_ids(name, STRING, value[0], pieces, named)
            elif kind == b"[" or name in OBJECT_OR_ID:
                ids = ID_MEMBER if kind == b"{" or name in TEXT_OR_ID else STRING
                if start >= done[ids]:
                    done[ids] = yield from end_of(piece, start)
                    for held in pieces.within(piece[start : done[ids]], seen[ids]):
                        yield from note_ids(name, ids, held, pieces, named)
            yield
        yield


DEFAULT_LIFETIME = "30m"


def note_lifetime(piece: Buffer, start: int, pieces: Pieces, named: References) -> Steps[None]:
    """Note whether options of the prompt cache ask for a lifetime other than the default. Raises
    Refusal for options that could be read in more than one way."""
    end = yield from end_of(piece, start)
    options = yield from members_in(pieces.parts(piece[start:end]))
    check_letters(options, {"ttl"})
    lifetime = options.get("ttl", NULL)
    if lifetime != NULL and string_in(lifetime) != DEFAULT_LIFETIME:
        named.long_cache = True


def note_ids(
    name: bytes, ids: re.Pattern[bytes], text: Buffer, pieces: Pieces, named: References
) -> Steps[None]:
    """Note all ids that the pattern `ids` finds in a text, as references by the member `name`."""
    yield
    for number, value in enumerate(ids.finditer(text)):
        if not pieces.is_mark(value[ids.groups]):
            named.add(Reference(name.decode(), string_in(value[ids.groups])))
        if number % PACE == 0:
            yield


def refuse_hidden(text: Buffer) -> Steps[bool]:
    """Raise Refusal for a name that matters but is written with escapes or look-alike letters: a
    search for its text would miss it. Return whether the text has any of these."""
    folded = not text.isascii() and any(letter in text for letter in FOLDED)
    if not folded and not ESCAPED.search(text):
        return False
    for number, match in enumerate(STRING.finditer(text)):
        if match.end() - match.start() <= MAX_HIDDEN and (folded or ESCAPED.search(match[0])):
            written = string_in(match[0])
            name = written.casefold()
            if HIDDEN.fullmatch(name.encode("utf-8", "replace")) and (
                name.encode() not in match[0].lower()
            ):
                message = (
                    f"The name '{name}' contains escapes or look-alike characters. "
                    "Write it in plain ASCII."
                )
                raise Refusal("invalid_request", message, param=name)
        if number % 256 == 0:
            yield
    return True
