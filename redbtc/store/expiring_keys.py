"""The keys that expire soon and were not replaced."""

from __future__ import annotations

EXPIRY_TOLD_DAYS = 7  # before a key expires, its account and the webhook are told
EXPIRING_SOON_DAYS = 14  # before a key expires, it is counted in the metrics, and `check` warns

# Keys in force that expire between ?1 and ?2, in milliseconds. A key that was rotated is left out
# if its owner then has another one. So are keys that were created for a shorter time than ?3.
EXPIRING = """
    FROM keys JOIN accounts ON accounts.id = keys.account_id
     WHERE keys.revoked_at IS NULL AND keys.expires_at > ?1 AND keys.expires_at <= ?2
       AND keys.expires_at - keys.created_at > ?3 AND accounts.status <> 'terminated'
       AND NOT EXISTS (SELECT 1 FROM keys AS newer
                        WHERE newer.budget_id = ifnull(keys.budget_id, keys.id)
                          AND newer.rowid > keys.rowid AND newer.revoked_at IS NULL
                          AND ifnull(newer.expires_at, keys.expires_at) >= keys.expires_at)"""
EXPIRING_KEYS = f"""
    SELECT keys.id, keys.label, keys.expires_at, accounts.name AS account {EXPIRING}
     ORDER BY keys.expires_at, keys.rowid"""
COUNT_EXPIRING = f"SELECT count(*) AS count {EXPIRING}"
EXPIRING_UNTOLD = f"""
    SELECT keys.id, keys.label, keys.expires_at, accounts.name AS account, account_id {EXPIRING}
       AND keys.expiry_told IS NOT keys.expires_at
     ORDER BY keys.expires_at, keys.rowid LIMIT ?4"""
NOTE_EXPIRY_TOLD = "UPDATE keys SET expiry_told = ? WHERE id = ?"
