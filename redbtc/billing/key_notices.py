"""Tell of keys that expire soon: their account by a notice, the operator by the webhook."""

from __future__ import annotations

from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.store.database import Store
from redbtc.store.expiring_keys import EXPIRING_UNTOLD, EXPIRY_TOLD_DAYS, NOTE_EXPIRY_TOLD
from redbtc.store.json_values import json_time, new_id
from redbtc.store.writer import SQLStatement
from redbtc.times import DAY

MAX_KEYS_TOLD = 100  # at once
KEY_NOTICE = """
    INSERT INTO notices (id, kind, account_id, key_id, text, effective_at, until, created_at)
    VALUES (?, 'key', ?, ?, ?, ?6, ?5, ?6)"""


async def tell_of_expiring_keys(store: Store, messages: WebhookMessages) -> None:
    """Tell of each key that expires within EXPIRY_TOLD_DAYS, once. Raises StorageUnavailable,
    sqlite3.Error."""
    now, days = store.time(), EXPIRY_TOLD_DAYS * DAY
    rows = store.rows(EXPIRING_UNTOLD, (now, now + days, days, MAX_KEYS_TOLD))
    for key in [each async for each in rows]:
        key_id, expires_at = key["id"], json_time(key["expires_at"])
        named = f"{key_id} ({key['label']})" if key["label"] else key_id
        text = f"{named} expires at {expires_at}. Create another one before."
        notice = new_id("ntc"), key["account_id"], key_id, text, key["expires_at"], now
        told: list[SQLStatement] = [
            (KEY_NOTICE, notice),
            (NOTE_EXPIRY_TOLD, (key["expires_at"], key_id)),
        ]
        if messages.webhook:
            data = {
                "account": key["account"],
                "key_id": key_id,
                "label": key["label"],
                "expires_at": expires_at,
                "text": f"Key {key_id} of {key['account']} expires at {expires_at}. Create another "
                "one for its user.",
            }
            told.append(messages.statement("key.expiring", data))
        await store.transact(*told)
        messages.wakeup.set()
