"""Read the Markdown files of [site]: the operator's terms and privacy policy.

A file begins with a head that names its version and the date from which it applies. The head is
strict, as the settings are:

    ---
    version: 2
    effective: 2027-01-15
    ---
    The text, in Markdown.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from redbtc.config import PAGES, SettingsError, SiteSettings
from redbtc.errors import UserError
from redbtc.times import DAY, MINUTE, day_of, iso_time, parse_time

MAX_DOCUMENT_BYTES = 256 << 10  # of which the worst takes about 2 s to render
HEAD_EDGE = "---"
HEAD_FIELDS = {
    "version": (
        re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}"),
        "1 to 50 letters, digits, '.', '_' and '-', and a letter or digit first",
    ),
    "effective": (
        re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII),
        "a date such as 2027-01-15, or a time such as 2027-01-15T12:00Z",
    ),
}
DOCUMENT_TITLES = {"terms": "Terms of service", "privacy": "Privacy policy"}


class Document(NamedTuple):
    """A version of a document as its file has it. `effective_at` is in milliseconds."""

    name: str
    version: str
    effective_at: int
    text: str  # Markdown, without the head

    @property
    def title(self) -> str:
        """The name that people give the document."""
        return DOCUMENT_TITLES[self.name]

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the text."""
        return digest_of(self.text)


def digest_of(text: str) -> bytes:
    """Return the SHA-256 of a document's text."""
    return hashlib.sha256(text.encode()).digest()


def read_documents(site: SiteSettings) -> list[Document]:
    """Return the documents that the settings name. Raises SettingsError."""
    paths = {name: getattr(site, name) for name in PAGES}
    return [read_document(name, Path(path)) for name, path in paths.items() if path]


def read_document(name: str, path: Path) -> Document:
    """Return the document in a file. Raises SettingsError that names the file and the line."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait
            raise SettingsError(f"site.{name}: {path}: not a file")
        with path.open("rb") as file:
            found = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"site.{name}: {path}: {error.strerror}") from None
    if len(found) > MAX_DOCUMENT_BYTES:
        raise SettingsError(
            f"site.{name}: {path}: larger than the {MAX_DOCUMENT_BYTES} bytes that are allowed"
        )
    try:
        return parse_document(name, decoded(found))
    except UserError as error:
        raise SettingsError(f"site.{name}: {path}, {error}") from None


def decoded(found: bytes) -> str:
    """Return a file's text with line feeds as ends of lines, and without a byte order mark. Raises
    UserError."""
    try:
        text = found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = found.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line}: not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_document(name: str, text: str) -> Document:
    """Return the document of a file's text. Raises UserError that names the line."""
    lines = text.split("\n")
    if lines[0].rstrip() != HEAD_EDGE:
        raise UserError(f"line 1: found {lines[0][:50]!r}; a head begins with {HEAD_EDGE!r}")
    head: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        if line.rstrip() == HEAD_EDGE:
            break
        field, value = parse_field(number, line)
        if field in head:
            raise UserError(f"line {number}: duplicate field {field!r}")
        head[field] = value
    else:
        raise UserError(f"line {len(lines)}: the head has no end; end it with {HEAD_EDGE!r}")
    for field in HEAD_FIELDS:
        if field not in head:
            raise UserError(f"line {number}: the head has no field {field!r}")
    body = "\n".join(lines[number:]).strip("\n")
    if not body.strip():
        raise UserError(f"line {number}: no text after the head")
    return Document(name, head["version"], effective_time(head["effective"]), body)


def parse_field(number: int, line: str) -> tuple[str, str]:
    """Return a field of a head and its value. Raises UserError."""
    field, colon, value = (part.strip() for part in line.partition(":"))
    if not colon or field not in HEAD_FIELDS:
        found = f"unknown field {field[:50]!r}" if colon else f"found {line[:50]!r}"
        raise UserError(f"line {number}: {found}; allowed: {', '.join(HEAD_FIELDS)}")
    form, allowed = HEAD_FIELDS[field]
    if not form.fullmatch(value):
        raise UserError(f"line {number}: {field}: found {value[:60]!r}; allowed: {allowed}")
    if field == "effective":
        try:
            effective_time(value)
        except UserError as error:
            raise UserError(f"line {number}: {field}: {error}") from None
    return field, value


def effective_time(text: str) -> int:
    """Return the milliseconds of a date, at which it begins in UTC, or of a time. Raises
    UserError."""
    return parse_time(text, 0, relative_to_past=False)


def date_text(at: int) -> str:
    """Return a time as people read it: as a date in UTC if that begins at it."""
    if at % DAY == 0:
        return day_of(at // DAY)
    return f"{(iso_time(at) or '')[: 16 if at % MINUTE == 0 else 19].replace('T', ' ')} UTC"
