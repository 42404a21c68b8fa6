"""The operation for a key that was leaked, with its input and its output."""

from __future__ import annotations

from msgspec import Struct

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import Input, Time
from redbtc.billing.key_activity import KeyActivity, activity_of_key
from redbtc.errors import StorageUnavailable
from redbtc.store.accounts import KeyAdded, KeyShown
from redbtc.times import parse_time


class KeyLeak(Input):
    """A report that a key was leaked. What the key did is listed from `since` on, a time or a
    duration back from now. Without `new_key`, no key takes its place."""

    since: Time = "24h"
    new_key: bool = True


class KeyCompromised(Struct):
    """A key that was revoked as compromised. `was_in_force` is false if it had been revoked or had
    expired before: then no new key is made. `cut` is the number of its requests in flight that were
    stopped, `also_in_force` the ids of other keys in force with its label or its budget. `activity`
    is null if it could not be read in time; ask again for a later `since`."""

    key: KeyShown
    was_in_force: bool
    cut: int
    new_key: KeyAdded | None
    also_in_force: list[str]
    activity: KeyActivity | None


class CompromisedKeyOperations(Access):
    """The operation for a key that was leaked."""

    async def compromise_key(self, actor: Actor, body: KeyLeak, key: str) -> KeyCompromised:
        """Revoke a leaked key, stop its requests, replace it, and list what it did."""
        store = self.billing.store
        since = parse_time(body.since, store.time(), relative_to_past=True)
        found = await self.find_key(actor, key)
        done = await self.accounts.compromise_key(found.id, actor.name, replace=body.new_key)
        cut = self.gateway.abort_key(found.id)
        added = None
        if done.added_id:
            added = await self.accounts.added_key(done.added_id, done.secret, found.id)
        return KeyCompromised(
            key=await self.accounts.key(found.id),
            was_in_force=done.was_in_force,
            cut=cut,
            new_key=added,
            also_in_force=await self.accounts.siblings(found.id, done.added_id),
            activity=await self._activity(found, since),
        )

    async def _activity(self, key: KeyShown, since: int) -> KeyActivity | None:
        """Return what the key did, or None if that can't be read: a new key must be shown all the
        same."""
        currency = self.billing.currency
        try:
            async with self.billing.store.snapshot() as snapshot:
                return await activity_of_key(snapshot, key.account_id, key.id, since, currency)
        except StorageUnavailable:
            return None
