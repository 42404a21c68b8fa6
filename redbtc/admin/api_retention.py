"""Operations that erase what is old."""

from __future__ import annotations

from msgspec import Struct

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import Input
from redbtc.errors import StorageUnavailable
from redbtc.store.erasure import due_accounts, erase_due
from redbtc.store.retention import Erased
from redbtc.times import iso_time

# A pause is so many times as long as the step before it: about one request in ten meets a step.
PURGE_PAUSE_FACTOR = 10
PURGE_SCRUB_SECONDS = 5
NOT_SCRUBBED = (
    "Another program reads the database; the erased data is gone from its files once that ends and "
    "db purge is run again, or a gateway runs."
)
NOT_TRUSTED = (
    "The ledger's time went ahead by more than a day, so no old rows are erased before {}. If the "
    "clock is right, use --accept-clock."
)

NOT_ERASED = "Account {} is not erased completely: {}. Run db purge again."


class PurgeOptions(Input):
    """The options of a purge. With `preview`, nothing is erased. With `accept_clock`, the ledger's
    time is believed even if it has just gone ahead."""

    preview: bool = False
    accept_clock: bool = False


class Purge(Struct):
    """What a purge has erased, and what is still to do, a sentence each. If `done` is false, this
    was a preview, which does not count bodies of requests."""

    done: bool
    erased: Erased
    still_to_do: list[str]


class RetentionOperations(Access):
    """Operations that erase what is old."""

    async def purge(self, actor: Actor, body: PurgeOptions) -> Purge:
        """Erase now what is older than the table [retention] of the settings allows."""
        retention, settings = self.retention, self.gateway.settings.retention
        trusted_at = await retention.look_at_clock()
        if body.accept_clock:
            trusted_at = 0
        still_to_do = [NOT_TRUSTED.format(iso_time(trusted_at))] if trusted_at else []
        if body.preview:
            erased = Erased()
            if not trusted_at:
                erased = await retention.preview(settings)
                erased.accounts = len(await due_accounts(self.billing.store))
            return Purge(False, erased, still_to_do)
        erased = Erased()
        try:
            erased.add_bodies(await retention.erase_expired_bodies())
        except StorageUnavailable as error:  # the ledger's rows don't wait for that
            still_to_do.append(f"Expired bodies of requests were not erased: {error}.")
        if not trusted_at:
            await retention.erase_old(settings, erased, PURGE_PAUSE_FACTOR)
            store, end_account = self.billing.store, self.gateway.end_account
            for end in await erase_due(store, self.request_log, end_account, actor.name):
                erased.accounts += not end.missing
                if end.missing:
                    still_to_do.append(NOT_ERASED.format(end.account_id, end.missing))
        await retention.record(erased, actor.name)
        if not await retention.scrub(PURGE_SCRUB_SECONDS, PURGE_PAUSE_FACTOR):
            still_to_do.append(NOT_SCRUBBED)
        return Purge(True, erased, still_to_do)
