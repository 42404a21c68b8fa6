"""Find the stored objects that a body names."""

from __future__ import annotations

import re

from msgspec import Struct

from redbtc.refusals import Refusal
from redbtc.request_body.edits import end_of
from redbtc.request_body.pieces import TEXT, Buffer, Pieces, Steps
from redbtc.request_body.strict_json import NULL, PACE, check_letters, members_in, string_in

STRING = re.compile(TEXT, re.DOTALL)
FOLDED = ("ſ".encode(), "\N{KELVIN SIGN}".encode())  # Unicode's case folding makes them s and k

WORDS = (
    rb"previous_response_id|comparison_response_id|conversation|file_ids?|vector_store_ids?|"
    rb"container(?:_id)?|skill_id|tunnel_id|approval_request_id|prompt|audio|voice"
)
CACHE_WORDS = rb"prompt_cache_(?:options|breakpoint)"  # members with a `ttl`
MEMBER = re.compile(  # the look-ahead rejects most strings early, where most of the time is spent
    rb'"(?=[acfpstv])(?:('
    + WORDS
    + rb')"\s*:\s*(?=["\[{])|type"\s*:\s*"item_reference"|('
    + CACHE_WORDS
    + rb')"\s*:\s*(?=\{))',
    re.IGNORECASE,
)
HIDDEN = re.compile(
    rb"(?:" + WORDS + rb"|" + CACHE_WORDS + rb"|item_reference|id|type|input)", re.IGNORECASE
)
ID_MEMBER = re.compile(rb'"id"\s*:\s*(' + TEXT + rb")", re.DOTALL | re.IGNORECASE)
# Escapes of ASCII letters and of the letters in FOLDED, which no writer needs. (With only one
# character before the look-ahead, the search is much faster than with four.)
ESCAPED = re.compile(rb"\\(?=u(?:00[4-7]|017[fF]|212[aA]))")
PLAIN = (b"prompt", b"audio", b"voice")  # members that may also be plain text
HOLDERS = (b"conversation", b"container", *PLAIN)  # members that may be an object with an id
MAX_REFERENCES = 20_000  # different ones, as many as items
MAX_MENTIONS = 50_000  # repeated ones included
ID_BYTES = 250  # of memory for an id and what refers to it, besides its characters
MAX_HIDING = 200  # bytes of a string that is looked at: any name with all its letters escaped


class Reference(Struct, frozen=True, gc=False):
    """A stored object that a body names, and the member that names it. It has to be the account's
    own: another account's and one that does not exist are refused alike. (Garbage collections skip
    it: to go through the references of many bodies would hold the loop.)"""

    name: str
    id: str


class References:
    """The ids in a body, each once: those of stored objects, and those that the client chose."""

    def __init__(self) -> None:
        self.found: dict[Reference, int] = {}  # and how often each is named
        self.chosen: set[str] = set()
        self.long_cache = False  # a cache lifetime other than the usual one is asked for
        self._mentions = 0
        self._characters = 0

    def excess(self, size: int) -> int:
        """Return by how many bytes of memory the ids are larger than `size`."""
        ids = len(self.found) + len(self.chosen)
        return max(0, ID_BYTES * ids + 4 * self._characters - size)

    def choose(self, object_id: str) -> None:
        """Note an id that the client chose."""
        if object_id not in self.chosen:
            self.chosen.add(object_id)
            self._characters += len(object_id)

    def add(self, reference: Reference) -> None:
        """Note a stored object. Raises Refusal for too many."""
        self._mentions += 1
        if self._mentions > MAX_MENTIONS:
            message = f"The body refers to stored objects more than {MAX_MENTIONS} times."
            raise Refusal("invalid_request", message)
        if reference not in self.found:
            self._characters += len(reference.id)
        self.found[reference] = self.found.get(reference, 0) + 1
        if len(self.found) > MAX_REFERENCES:
            message = f"The body refers to more than {MAX_REFERENCES} stored objects."
            raise Refusal("invalid_request", message)


def named_in(text: Buffer, pieces: Pieces, named: References) -> Steps[None]:
    """Note the stored objects that members in a text name, at any depth."""
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
                if value and name not in PLAIN:
                    yield from note_ids(name, STRING, value[0], pieces, named)
            elif kind == b"[" or name in HOLDERS:
                ids = ID_MEMBER if kind == b"{" or name in PLAIN else STRING
                if start >= done[ids]:
                    done[ids] = yield from end_of(piece, start)
                    for held in pieces.within(piece[start : done[ids]], seen[ids]):
                        yield from note_ids(name, ids, held, pieces, named)
            yield
        yield


USUAL_LIFETIME = "30m"


def note_lifetime(piece: Buffer, start: int, pieces: Pieces, named: References) -> Steps[None]:
    """Note whether an object of options of the prompt cache asks for another lifetime than the
    usual one. Raises Refusal for one that could be read in more than one way."""
    end = yield from end_of(piece, start)
    options = yield from members_in(pieces.parts(piece[start:end]))
    check_letters(options, {"ttl"})
    lifetime = options.get("ttl", NULL)
    if lifetime != NULL and string_in(lifetime) != USUAL_LIFETIME:
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
    """Raise Refusal for a name that matters but is written with escapes or look-alike letters, so
    that a search by its text would miss it. Return whether the text has any of these."""
    folded = not text.isascii() and any(letter in text for letter in FOLDED)
    if not folded and not ESCAPED.search(text):
        return False
    for number, match in enumerate(STRING.finditer(text)):
        if match.end() - match.start() <= MAX_HIDING and (folded or ESCAPED.search(match[0])):
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
