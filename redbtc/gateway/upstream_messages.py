"""The messages to the webhook about upstreams: a member was taken out, serves again, or its key was
rejected.

An upstream that goes up and down by turns must not flood the webhook. So a member has at most one
upstream.out in PAIR_SECONDS, and one upstream.back for it. An outage that begins sooner is told of
when that time has passed, if it lasts until then. Each upstream.out has its upstream.back in the
end, also after a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any

from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.times import iso_time
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.health import CREDENTIALS

PAIR_SECONDS = 300.0  # also between two messages that a member's key was rejected


class MemberMessages:
    """What the webhook was told of one member."""

    def __init__(self) -> None:
        self.out_sent = False  # and not yet that it serves again
        self.credentials_sent = False  # since it served the last time
        self.outage: dict[str, Any] | None = None  # what there is to tell; None: it serves
        self.next_out_at = self.next_credentials_at = 0.0  # not before, by the event loop's clock
        self.timer: asyncio.TimerHandle | None = None  # until `next_out_at`, in an outage


class UpstreamMessages:
    """Decides which changes of upstreams the webhook is told."""

    def __init__(self, messages: WebhookMessages, now: Callable[[], int]) -> None:
        """`now` returns the ledger's time in milliseconds."""
        self._messages = messages
        self._now = now
        self._members: dict[str, MemberMessages] = {}

    def note(self, change: UpstreamChange, until: int | None) -> None:
        """Tell the webhook of a change, if it should know. `until` is the change's end, in
        milliseconds of the ledger's time."""
        member = self._members.setdefault(change.upstream, MemberMessages())
        if change.reason == CREDENTIALS:
            self._tell_credentials(member, change, until)
        if change.is_outage:
            if member.outage is None or not change.model:
                member.outage = data_about(change, until, outage_text(change, until))
            if not member.out_sent and member.timer is None:
                self._tell_out(member)
        elif change.state == "up" or not change.model:  # else only a rest for one model has changed
            if change.reason != CREDENTIALS:
                member.credentials_sent = False
            text = f"{change.upstream} serves again: {change.reason}."
            self._tell_back(member, data_about(change, None, text))

    async def resume(self, members: Mapping[str, bool], resting: Collection[str]) -> None:
        """Go on after a restart: tell of each outage that was told before and is over. `members`
        are the names of all members, and whether each can serve; `resting` are those that rest for
        all models. Raises StorageUnavailable."""
        loop, now = asyncio.get_running_loop(), self._now()
        for upstream, sent_at in (await self._messages.outages_sent()).items():
            member = self._members[upstream] = MemberMessages()
            member.out_sent = True
            passed = max(0.0, (now - sent_at) / 1000)
            member.next_out_at = loop.time() + max(0.0, PAIR_SECONDS - passed)
            if upstream not in resting and members.get(upstream, False):
                self._tell_back(member, data_after(upstream, "restarted"))
        self.forget_all_but(members)

    def forget_all_but(self, members: Collection[str]) -> None:
        """Forget the members that the settings don't have any more."""
        for upstream in [each for each in self._members if each not in members]:
            member = self._members.pop(upstream)
            self._tell_back(member, data_after(upstream, "removed"))

    def _tell_out(self, member: MemberMessages) -> None:
        """Tell of the outage of a member now, or as soon as that is allowed if it lasts."""
        loop = asyncio.get_running_loop()
        member.timer = None
        if member.outage is None or self._messages.webhook is None:
            return
        if loop.time() < member.next_out_at:
            member.timer = loop.call_at(member.next_out_at, self._tell_out, member)
            return
        member.out_sent = True
        member.next_out_at = loop.time() + PAIR_SECONDS
        self._messages.add("upstream.out", member.outage)

    def _tell_back(self, member: MemberMessages, data: dict[str, Any]) -> None:
        """Tell that a member serves again, if the webhook believes that it doesn't."""
        member.outage = None
        if member.timer:
            member.timer.cancel()
            member.timer = None
        if member.out_sent:
            member.out_sent = False
            self._messages.add("upstream.back", data)

    def _tell_credentials(
        self, member: MemberMessages, change: UpstreamChange, until: int | None
    ) -> None:
        now = asyncio.get_running_loop().time()
        is_sent = member.credentials_sent or now < member.next_credentials_at
        if is_sent or self._messages.webhook is None:
            return
        member.credentials_sent = True
        member.next_credentials_at = now + PAIR_SECONDS
        text = f"{change.upstream} rejected the API key that the gateway uses for it."
        self._messages.add("upstream.credentials", data_about(change, until, text))


def data_about(change: UpstreamChange, until: int | None, text: str) -> dict[str, Any]:
    """Return the data of a message about a change."""
    return {
        "upstream": change.upstream,
        "state": change.state,
        "reason": change.reason,
        "until": iso_time(until),
        "text": text,
    }


def data_after(upstream: str, reason: str) -> dict[str, Any]:
    """Return the data of the message that an outage is over which no change has ended."""
    change = UpstreamChange(upstream, "up", "out", reason, "", None, "")
    ended = "was removed from the settings" if reason == "removed" else f"serves again: {reason}"
    return data_about(change, None, f"{upstream} {ended}.")


def outage_text(change: UpstreamChange, until: int | None) -> str:
    """Return a sentence that says why a member serves nothing, and for how long at most."""
    what = {"out": "was taken out", "unusable": "can't be used"}.get(change.state, "rests")
    end = "" if until is None else f" until {iso_time(until)} at the latest"
    return f"{change.upstream} {what}{end}: {change.reason}."
