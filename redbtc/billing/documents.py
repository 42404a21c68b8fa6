"""The operator's terms and privacy policy: their published versions.

Rule 1. A published version never changes, and its text stays readable. A new text is a new version.

Rule 2. The versions of a document follow each other: each takes effect later than the one before.
So the newest version is the one that takes effect last, and the version in force is the latest that
has taken effect. Before any has, it is the first.

Rule 3. The first version needs no notice, since nothing was agreed before it. Any later one takes
effect billing.terms_notice_days after it was published, or later. Version and notice are written in
one transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from redbtc.billing.document_files import Document, date_text, digest_of
from redbtc.billing.notices import document_notice
from redbtc.config import PAGES, Settings, SettingsError
from redbtc.store.database import Store
from redbtc.store.writer import SQLStatement
from redbtc.times import DAY, MINUTE, day_of

DOCUMENTS = """
    SELECT name, version, effective_at, published_at, text FROM documents
     ORDER BY name, effective_at"""
DOCUMENT_TEXT = "SELECT text FROM documents WHERE name = ? AND version = ?"
ADD_DOCUMENT = """
    INSERT INTO documents (name, version, effective_at, text, published_at, notice_id)
    VALUES (?, ?, ?, ?, ?, ?)"""


class Published(NamedTuple):
    """A published version of a document. Times are in milliseconds."""

    name: str
    version: str
    effective_at: int
    published_at: int
    digest: bytes  # of the text


class Documents:
    """The published versions of all documents, and those of them that the settings name."""

    def __init__(self, store: Store) -> None:
        """Call `read` before use."""
        self._store = store
        self._configured: frozenset[str] = frozenset()
        self._published: dict[str, list[Published]] = {name: [] for name in PAGES}
        self._publishing = asyncio.Lock()

    async def read(self) -> None:
        """Read from the ledger which versions are published."""
        rows = [tuple(row) async for row in self._store.rows(DOCUMENTS)]
        self._published = by_document(rows)

    def names(self) -> list[str]:
        """Return the names of the documents that are shown: those that the settings name."""
        return [name for name in PAGES if name in self._configured and self._published[name]]

    def versions(self, name: str) -> list[Published]:
        """Return the published versions of a document in the order in which they take effect."""
        return self._published[name]

    def all(self) -> list[Published]:
        """Return all published versions, also of documents that the settings no longer name."""
        return [each for name in PAGES for each in self._published[name]]

    def in_force(self, name: str) -> Published:
        """Return the version of a shown document that is in force now; the first if none is."""
        now, versions = self._store.time(), self._published[name]
        return next((each for each in reversed(versions) if each.effective_at <= now), versions[0])

    def newest(self) -> list[Published]:
        """Return the newest version of each document that is shown, also if it is not in force
        yet."""
        return [self._published[name][-1] for name in self.names()]

    async def text(self, each: Published) -> str:
        """Return the Markdown of a version. Raises sqlite3.Error, StorageUnavailable."""
        row = await self._store.one(DOCUMENT_TEXT, (each.name, each.version))
        assert row is not None, "a published document is never deleted"
        return str(row["text"])

    def check(self, documents: Iterable[Document], notice_days: int) -> list[Document]:
        """Return those of the documents that are not published yet. Raises SettingsError if one
        can't be."""
        now = self._store.time()
        return [
            each for each in documents if is_new(each, self._published[each.name], now, notice_days)
        ]

    async def publish(
        self, documents: Sequence[Document], settings: Settings, by: str
    ) -> list[Document]:
        """Show these documents and no others, and publish those that are new, each with its notice
        if it is not the first version. Return the new ones. Raises SettingsError if one can't be
        published, and StorageUnavailable or sqlite3.Error if the ledger can't be written or read.
        """
        async with self._publishing:
            days = settings.billing.terms_notice_days
            new = self.check(documents, days)
            self._configured = frozenset(each.name for each in documents)
            if new:  # a change that took too long may have been made after all
                await self.read()
                new = self.check(documents, days)
            if new:
                statements = [
                    statement for each in new for statement in self._statements(each, settings, by)
                ]
                await self._store.transact(*statements, by=by)
                await self.read()
            return new

    def _statements(self, document: Document, settings: Settings, by: str) -> list[SQLStatement]:
        """Return what adds a new version and its notice."""
        now, notice_id, statements = self._store.time(), None, list[SQLStatement]()
        if self._published[document.name]:
            url = f"{settings.dashboard_url.rstrip('/')}/{document.name}?version={document.version}"
            text = (
                f"{document.title}: version {document.version} takes effect on "
                f"{date_text(document.effective_at)}. Read it at {url}"
            )
            at, days = document.effective_at, settings.billing.terms_notice_days
            notice_id, notice = document_notice(
                text, at, max(at, now) + max(days, 1) * DAY, now, by
            )
            statements.append(notice)
        values = (*document, now, notice_id)
        return [*statements, (ADD_DOCUMENT, values)]


def by_document(rows: Iterable[tuple[str, str, int, int, str]]) -> dict[str, list[Published]]:
    """Return the versions of each document from the rows of DOCUMENTS."""
    found: dict[str, list[Published]] = {name: [] for name in PAGES}
    for name, version, effective_at, published_at, text in rows:
        found[name].append(Published(name, version, effective_at, published_at, digest_of(text)))
    return found


def is_new(document: Document, published: Sequence[Published], now: int, notice_days: int) -> bool:
    """Return whether a document is a version that is not published yet. Raises SettingsError if it
    contradicts the published versions, or a new version takes effect too early."""
    place = f"site.{document.name}: version {document.version}"
    for known in published:
        if known.version != document.version:
            continue
        if known.digest != document.digest:
            raise SettingsError(
                f"{place} was published with another text; give the new text a new version"
            )
        if known.effective_at != document.effective_at:
            raise SettingsError(
                f"{place} was published with another date, {date_text(known.effective_at)}; keep "
                "that, or give the document a new version"
            )
        if known is not published[-1]:
            raise SettingsError(
                f"{place} was superseded by version {published[-1].version}; give the document a "
                "new version"
            )
        return False
    if published:
        check_notice_period(document, published[-1], now, notice_days)
    return True


def check_notice_period(document: Document, last: Published, now: int, notice_days: int) -> None:
    """Raise SettingsError if a new version takes effect too early, or not after the last one."""
    earliest = max(now + notice_days * DAY - MINUTE, last.effective_at + 1)
    if document.effective_at < earliest:
        first_day = max(-(-(now + notice_days * DAY) // DAY), last.effective_at // DAY + 1)
        raise SettingsError(
            f"site.{document.name}: effective: {date_text(document.effective_at)} is too early; a "
            f"new version needs {notice_days} days of notice (billing.terms_notice_days), and must "
            f"take effect later than the one before ({last.version}: "
            f"{date_text(last.effective_at)}). The earliest date is {day_of(first_day)}"
        )
