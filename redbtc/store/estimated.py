"""Find requests that were settled by an estimate, and correct them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from redbtc.store.database import Store
from redbtc.usage import KINDS, Usage

CORRECTED = (
    "request_id",
    "account_id",
    "month",
    "created_at",
    "service_tier",
    "price_id",
    "cost",
    *KINDS,
)
CORRECT = f"""
    INSERT INTO corrections ({", ".join(CORRECTED)})
    SELECT {", ".join(f"?{place}" for place in range(1, len(CORRECTED) + 1))}
     WHERE EXISTS (SELECT 1 FROM estimates WHERE request_id = ?1)"""


class EstimatedRow(NamedTuple):
    """An estimated request whose response may be fetched later. `cost` and `held` are in nanos;
    `held` is 0 if it is not known."""

    request_id: str
    key_id: str
    requested_model: str
    cost: int
    output_tokens: int
    file_searches: int | None
    containers: int | None
    admitted_at: int
    image_model: str
    held: int


NOT_NULL = ("cost", "output_tokens", "held")
ESTIMATED_COLUMNS = [
    f"ifnull({name}, 0)" if name in NOT_NULL else name for name in EstimatedRow._fields
]
ESTIMATED = f"""
    SELECT {", ".join(ESTIMATED_COLUMNS)} FROM estimates JOIN requests USING (request_id)
     WHERE estimates.response_id = ? AND account_id = ?"""


def estimated_of(store: Store, response_id: str, account_id: str) -> EstimatedRow | None:
    """Return the account's estimated request that made a response, None if there is none or it was
    corrected already. Raises StorageUnavailable."""
    found = store.look_up(ESTIMATED, (response_id, account_id))
    return EstimatedRow(*found) if found else None


async def correct(store: Store, values: Sequence[Any], usage: Usage) -> None:
    """Commit a correction, unless the request was corrected already. `values` are those of the
    columns CORRECTED before the usage."""
    await store.record(
        CORRECT, (*values, *msgspec.structs.astuple(usage)), retry_until_written=True
    )
