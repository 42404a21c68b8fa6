"""Close accounts: what their owners ask for, and their termination."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from redbtc.store.accounts import END_SESSIONS
from redbtc.store.database import Store
from redbtc.store.json_values import Moment, json_time
from redbtc.store.writer import SQLStatement

ASK_FOR_CLOSING = """
    UPDATE accounts SET closing_asked_at = ?1 WHERE id = ?2 AND closing_asked_at IS NULL"""
WITHDRAW_CLOSING = "UPDATE accounts SET closing_asked_at = NULL WHERE id = ?"
TERMINATE = """
    UPDATE accounts SET status = 'terminated', terminated_at = ?1, erase_at = ?2
     WHERE id = ?3 AND status <> 'terminated'"""
REVOKE_KEYS = "UPDATE keys SET revoked_at = ?1 WHERE account_id = ?2 AND revoked_at IS NULL"
END_LINKS = """
    UPDATE users SET link = NULL, link_expires_at = NULL
     WHERE account_id = ? AND link IS NOT NULL"""
ERASE_NOW = "UPDATE accounts SET erase_at = min(erase_at, ?1) WHERE id = ?2"
ASKED_TO_CLOSE = """
    SELECT name AS account, id AS account_id, closing_asked_at FROM accounts
     WHERE closing_asked_at IS NOT NULL AND status <> 'terminated'
     ORDER BY closing_asked_at LIMIT 100"""
KEY_IDS = "SELECT id FROM keys WHERE account_id = ?"


class AskedToClose(Struct):
    """An account whose owner has asked to close it."""

    account: str
    account_id: str
    closing_asked_at: Moment


async def asked_to_close(store: Store) -> list[AskedToClose]:
    """Return the accounts that are to be closed, those that have waited longest first; at most
    100."""
    return [
        AskedToClose(row["account"], row["account_id"], json_time(row["closing_asked_at"]))
        async for row in store.rows(ASKED_TO_CLOSE)
    ]


async def ask_for_closing(
    store: Store, account_id: str, message: Sequence[SQLStatement], by: str
) -> None:
    """Note that an account is to be closed, and add the messages that say so. Asking again keeps
    the first time."""
    await store.transact(*message, (ASK_FOR_CLOSING, (store.time(), account_id)), by=by)


async def withdraw_closing(store: Store, account_id: str, by: str) -> None:
    """Note that an account is not to be closed any more."""
    await store.transact((WITHDRAW_CLOSING, (account_id,)), by=by)


async def terminate(store: Store, account_id: str, erase_at: int, by: str) -> None:
    """Terminate an account: revoke its keys, log its members out, and end their one-time links.
    What identifies it is due to be erased at `erase_at`."""
    now = store.time()
    await store.transact(
        (REVOKE_KEYS, (now, account_id)),
        (END_SESSIONS, (account_id,)),
        (END_LINKS, (account_id,)),
        (TERMINATE, (now, erase_at, account_id)),
        by=by,
    )


async def erase_now(store: Store, account_id: str, by: str) -> None:
    """Let the erasure of a terminated account be due now."""
    await store.transact((ERASE_NOW, (store.time(), account_id)), by=by)


async def key_ids(store: Store, account_id: str) -> list[str]:
    """Return the ids of all keys of an account."""
    return [row["id"] async for row in store.rows(KEY_IDS, (account_id,))]
