"""Read the parts of multipart forms: their short fields, and the sizes of the other parts."""

from __future__ import annotations

import re

from redbtc.meter.answers import MAX_NAME
from redbtc.refusals import Refusal
from redbtc.request_body.contents import BodyContents, ToolUse
from redbtc.request_body.facts import UNNAMED, Facts, bad_number, check_short
from redbtc.request_body.media import CHARSETS, parametrized
from redbtc.request_body.pieces import Buffer, Pieces, check_utf8
from redbtc.request_body.references import Reference, References, named_in, refuse_hidden
from redbtc.steps import Steps

MAX_PART_HEAD = 8192
MAX_FIELD = 4096
MAX_FORM_PARTS = 1000
FORM_WINDOW = 64 << 10  # bytes that are searched in one step
SINGLE_FIELDS = (b"model", b"stream", b"n", b"svg[model]", b"output_format")
# Readers differ in how they read spaces, control characters, '%5B', accents and look-alike letters.
FIELD_NAME = re.compile(rb"[A-Za-z0-9_.\[\]-]+")
ODD_SINGLE = re.compile(
    rb"(?:model|stream|n|prompt|output_format)[.\[]|_charset_$", re.IGNORECASE
)  # RFC 7578 §4.6
NUMBER = re.compile(rb"[1-9][0-9]{0,2}")
# Some readers split a part of one of these types into further fields.
NESTED_TYPE = re.compile(rb"multipart/|message/|application/x-www-form-urlencoded")
FORM_END = re.compile(rb"--(?:[ \t\r\n]|\Z)")  # otherwise some readers don't take it for a boundary
HEAD_LINE = re.compile(rb"([\w-]++):([^\r\n]*+)")
FORM_NAME = re.compile(
    rb"file_ids?|vector_store_ids?|container_id|_response_id|conversation", re.IGNORECASE
)
ODD_SVG = re.compile(rb"svg(?!\[model\]$|\[reasoning\])", re.IGNORECASE)
URL = re.compile(rb"(?::|\\u003a)(?:\\?/|\\u002f){2}", re.IGNORECASE)  # within JSON, too
LIKE_A_FIELD = re.compile(rb'\s*(?:[{\["]|[A-Za-z][A-Za-z0-9+.-]*://)')
UNENCODED = (b"binary", b"8bit", b"7bit")
MAX_PICTURE_TOKENS = 16_000  # no model counts more tokens for one picture or recording
LONG_FIELDS = (b"prompt", b"known_speaker_references[]")  # the latter are recordings


class Form:
    """A multipart form (RFC 7578, RFC 2046 §5.1.1), which is read as it arrives: the names of its
    parts, and its short fields. Files are stepped over, never copied."""

    def __init__(self, boundary: bytes) -> None:
        self.names: set[bytes] = set()  # in lower case
        self.fields: dict[bytes, bytes] = {}
        self._parts = 0
        self._tokens = 0
        self.files = self.file_bytes = 0
        self._delimiter = b"--" + boundary
        self._part = -1  # where the incomplete part begins
        self._searched = 0

    def grow(self, body: Buffer) -> Steps[None]:
        """Parse what has arrived since the last call, in small steps. `body` is all of the form so
        far. Raises Refusal for a form that could be read in more than one way."""
        size = len(self._delimiter)
        while self._searched <= len(body) - size:
            end = body.find(self._delimiter, self._searched, self._searched + FORM_WINDOW)
            if end < 0:
                window_end = min(self._searched + FORM_WINDOW, len(body))
                self._searched = window_end - size + 1
            else:
                self._take_boundary(body, end)
            yield

    def _take_boundary(self, body: Buffer, end: int) -> None:
        """Take the boundary at `end`, which ends a part unless it is the first."""
        first = self._part < 0  # nothing may come before it, since some readers would read that
        if (end and body[end - 2 : end] != b"\r\n") or (first and end > 2):
            raise Refusal("invalid_request", "The form's boundary must be at the start of a line.")
        if not first:
            self._take_part(body, end - 2)
        self._part = self._searched = end + len(self._delimiter)

    def _take_part(self, body: Buffer, end: int) -> None:
        """Take a part that is whole and ends at `end`. Raises Refusal."""
        start = self._part
        self._parts += 1
        if self._parts > MAX_FORM_PARTS:
            raise Refusal("invalid_request", f"The form has more than {MAX_FORM_PARTS} parts.")
        head_end = body.find(b"\r\n\r\n", start, min(end, start + MAX_PART_HEAD))
        parameters = parameters_of_part(bytes(body[start : max(start, head_end)]))
        name, size = parameters[b"name"], end - head_end - 4
        field = not {b"filename", b"filename*"} & parameters.keys()
        if not field and not parameters.get(b"filename"):
            self._check_ambiguous(name, bytes(body[head_end + 4 : min(end, head_end + 64)]))
        self._tokens += end - start if field else min(end - start, MAX_PICTURE_TOKENS)
        if not field:
            self.files, self.file_bytes = self.files + 1, self.file_bytes + size
        single = name.lower() in SINGLE_FIELDS
        proper = field and name.lower() not in self.names and name.islower()
        self.names.add(name.lower())
        long = field and size > MAX_FIELD and name not in LONG_FIELDS
        if (single and not proper) or long or ODD_SVG.match(name) or ODD_SINGLE.match(name):
            shown = name.decode()
            message = (
                f"'{shown}' must be in the form once, in lower case, as a text field of at most "
                f"{MAX_FIELD} bytes."
            )
            raise Refusal("invalid_request", message, param=shown)
        if field and size <= MAX_FIELD:
            self.fields[name] = bytes(body[head_end + 4 : end])

    @staticmethod
    def _check_ambiguous(name: bytes, begin: bytes) -> None:
        """Raise Refusal for a part whose filename is empty or only a `filename*`, if its value
        begins like JSON or a URL: some readers take such a part for a file, others for a field."""
        if LIKE_A_FIELD.match(begin):
            shown = name.decode()
            message = (
                f"'{shown}' has no 'filename', or an empty one. Name the file, or send a field "
                "without 'filename' and 'filename*'."
            )
            raise Refusal("invalid_request", message, param=shown)

    def has_url(self) -> bool:
        """Return whether a field other than a prompt has a URL."""
        return any(URL.search(value) for name, value in self.fields.items() if name != b"prompt")

    def has_file(self, name: bytes) -> bool:
        """Return whether a part of this name is there, and all such parts are files."""
        return name in self.names and name not in {each.lower() for each in self.fields}

    def max_tokens(self, body: Buffer) -> int:
        """Return the maximum number of tokens that the parts can have."""
        return self._tokens + min(len(body) - max(self._part, 0), MAX_PICTURE_TOKENS)

    def contents(self, body: Buffer) -> Steps[BodyContents]:
        """Return what was found in the form, once it is whole. Raises Refusal."""
        facts = self.facts(body)
        check_short(facts)
        named = yield from self.references()
        author = self.fields.get(b"svg[model]", b"").decode("utf-8", "replace")
        is_svg = self.fields.get(b"output_format", b"").strip().lower() == b"svg"
        use = ToolUse(models={author or UNNAMED: False} if author or is_svg else {})
        return BodyContents(facts, named, use, self.files, self.file_bytes, self.max_tokens(body))

    def references(self) -> Steps[References]:
        """Return the stored objects that the form names, by the name of a part or in a short field.
        Raises Refusal."""
        named = References()
        for name, value in self.fields.items():
            if name != b"prompt":
                yield from check_utf8(value)
                yield from refuse_hidden(value)
                yield from named_in(value, Pieces(value), named)
            yield
        for name in self.names:
            if match := FORM_NAME.search(name.replace(b".", b"_")):
                named.add(Reference(match[0].decode(), ""))
        return named

    def facts(self, body: Buffer) -> Facts:
        """Return the facts in the fields of the whole form, wherever they are: openai-node sends
        files before them. Raises Refusal if the form has no end."""
        if self._part < 0 or not FORM_END.match(body, self._part):
            raise Refusal(
                "invalid_request", "The form is incomplete: its closing boundary is missing."
            )
        stream = self.fields.get(b"stream", b"").strip().lower() in (b"true", b"1")
        model, number = self.fields.get(b"model"), self.fields.get(b"n")
        if number is not None and not NUMBER.fullmatch(number):
            raise bad_number()
        return Facts(
            model=model.decode("utf-8", "replace") if model else None,
            stream=stream,
            n=int(number) if number else None,
        )


def parameters_of_part(head: bytes) -> dict[bytes, bytes]:
    """Return the parameters of a part's Content-Disposition, `name` among them. Raises Refusal if
    the part's head can't be read, or could be read in more than one way."""
    padding, *lines = head.split(b"\r\n")
    matches = [HEAD_LINE.fullmatch(line) for line in lines]
    fields = {match[1].lower(): match[2] for match in matches if match}
    found = parametrized(fields.get(b"content-disposition", b""))
    encoding = fields.get(b"content-transfer-encoding", b"binary").strip().lower()
    once = not padding.strip(b" \t") and len(fields) == len(lines) and encoding in UNENCODED
    name = found[1].get(b"name", b"") if found and found[0] == b"form-data" else b""
    plain = is_plain(fields.get(b"content-type", b"").strip().lower())
    if not (once and plain and found and 0 < len(name) <= MAX_NAME):
        raise Refusal("invalid_request", "A part of the form has invalid headers.")
    if not FIELD_NAME.fullmatch(name):
        message = "The name of a form field may contain only letters, digits and '_.-[]'."
        raise Refusal("invalid_request", message)
    return found[1]


def is_plain(content_type: bytes) -> bool:
    """Return whether a part of this type contains neither parts of its own nor text in a charset
    other than UTF-8."""
    found = parametrized(content_type)
    charset = found[1].get(b"charset", b"utf-8") if found else b"charset" in content_type
    return charset in (*CHARSETS, False) and not NESTED_TYPE.match(content_type)
