"""What happens to upstreams is logged, recorded, and told to the webhook."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.gateway.upstream_messages import UpstreamMessages
from redbtc.store.database import Store
from redbtc.store.failures import LogFunction
from redbtc.store.upstream_changes import MAX_MODEL, MAX_REASON, record_upstream_change
from redbtc.store.upstream_rests import (
    UpstreamRest,
    read_rests,
    remove_rest,
    remove_rests,
    save_rest,
)
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.health import CREDENTIALS


class UpstreamJournal:
    """The journal of one gateway. `note` is to be called with each change of a member."""

    def __init__(self, store: Store, messages: WebhookMessages, log: LogFunction) -> None:
        self._store = store
        self._log = log
        self._messages = UpstreamMessages(messages, store.time)

    def note(self, change: UpstreamChange) -> None:
        """Log and record a change, tell the webhook of an outage, and save a rest for the time
        after a restart. It waits for nothing, and a ledger that fails delays only the records."""
        model = change.model  # which a client has named, and which may be long
        change = change._replace(reason=change.reason[:MAX_REASON], model=model[:MAX_MODEL])
        now = self._store.time()
        until = None if change.seconds is None else now + round(change.seconds * 1000)
        level = logging.WARNING if change.is_outage else logging.INFO
        if change.reason == CREDENTIALS:
            level = logging.ERROR
        fields = {
            name: value for name, value in change._asdict().items() if value not in ("", None)
        }
        self._log(level, "upstream changed", **fields)
        states = change.was, change.state
        record_upstream_change(
            self._store, change.upstream, states, change.reason, change.model, until, change.by
        )
        if change.is_end and change.by and not model:
            remove_rests(self._store, change.upstream)
        elif change.is_end:
            remove_rest(self._store, change.upstream, model)
        elif until is not None and model == change.model and is_rest(change):
            save_rest(self._store, change.upstream, model, (now, until), change.reason)
        self._messages.note(change, until)

    async def resume(self, members: Mapping[str, bool]) -> list[UpstreamRest]:
        """Return the rests that a restart has interrupted, of the members that there still are.
        `members` are their names, and whether each can serve. Raises StorageUnavailable."""
        rests = [each for each in await read_rests(self._store) if each.upstream in members]
        whole = [each for each in rests if not each.model]
        await self._messages.resume(members, {each.upstream for each in whole})
        for upstream, _, until, reason in whole:  # the webhook may not have been told of it yet
            seconds = (until - self._store.time()) / 1000
            change = UpstreamChange(upstream, "resting", "up", reason, "", seconds, "")
            self._messages.note(change, until)
        return rests

    def go_on_with(self, outages: Mapping[str, str]) -> None:
        """Go on with the outages of another process, given as reasons by member: the webhook may
        not have been told of them yet."""
        for upstream, reason in outages.items():
            self._messages.note(UpstreamChange(upstream, "out", "up", reason, "", None, ""), None)

    def forget_rests_but(self, before: Mapping[str, object], after: Mapping[str, object]) -> None:
        """Forget the rests of members that are gone or whose health is another one than before:
        they rest no more, so they must not do so after a restart either."""
        for upstream in before:
            if before[upstream] is not after.get(upstream):
                remove_rests(self._store, upstream)

    def forget_all_but(self, members: Collection[str]) -> None:
        """Forget the members that the settings don't have any more."""
        self._messages.forget_all_but(members)


def is_rest(change: UpstreamChange) -> bool:
    """Return whether a restart must not end what has begun: an upstream's limit, or an operator's
    decision. A member that failed is tried again after a restart."""
    return change.state == "resting" or bool(change.model or change.by)
