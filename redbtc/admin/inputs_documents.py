"""Define the inputs of the operations on the operator's documents."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from redbtc.admin.inputs import Input

DocumentVersion = Annotated[str, Meta(min_length=1, max_length=50)]


class Accepted(Input):
    """The versions that you accept: those that you were shown."""

    terms: DocumentVersion | None = None
    privacy: DocumentVersion | None = None
