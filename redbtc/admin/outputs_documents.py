"""Define the answers of the operations on the operator's documents."""

from __future__ import annotations

from msgspec import Struct

from redbtc.billing.acceptances import Acceptance
from redbtc.store.json_values import Moment


class DocumentVersionShown(Struct):
    """A published version of a document: `terms` or `privacy`. `url` is where it can be read."""

    document: str
    version: str
    effective_at: Moment
    published_at: Moment
    url: str


class DocumentCount(DocumentVersionShown):
    """A published version. `owners` is the number of owners who have accepted it."""

    owners: int


class DocumentList(Struct):
    """The published versions of all documents."""

    documents: list[DocumentCount]


class ToAccept(Struct):
    """The versions that you have yet to accept."""

    documents: list[DocumentVersionShown]


class AcceptanceList(Struct):
    """The acceptances of an account's owners, oldest first."""

    acceptances: list[Acceptance]
