"""Operations that close accounts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs_closing import AccountTerminated, Termination
from redbtc.errors import Conflict, StorageUnavailable
from redbtc.store.accounts import Account
from redbtc.store.closing import ask_for_closing, erase_now, terminate, withdraw_closing
from redbtc.store.copies import copies_beside
from redbtc.store.erasure import ErasureEnd, ErasureProgress, erase_account
from redbtc.store.json_values import json_time
from redbtc.times import DAY


class ClosingOperations(Access):
    """Operations that close accounts."""

    async def ask_for_closing(self, actor: Actor, account: str) -> Account:
        """Ask for an account to be closed. Operators are told."""
        found = await self.find_account(actor, account)
        if found.status == "terminated":
            raise Conflict(f"account {found.name!r} is terminated already")
        if found.closing_asked_at is None:
            messages = self.billing.messages
            data = {
                "account": found.name,
                "account_id": found.id,
                "text": f"Account {found.name} asks to be closed.",
            }
            message = messages.statement("account.closing", data)
            await ask_for_closing(self.billing.store, found.id, [message], actor.name)
            messages.wakeup.set()
        return self.as_shown(actor, await self.accounts.get(found.id))

    async def withdraw_closing(self, actor: Actor, account: str) -> Account:
        """Withdraw the wish to close an account."""
        found = await self.find_account(actor, account)
        if found.status == "terminated":
            raise Conflict(f"account {found.name!r} is terminated; that can't be undone")
        await withdraw_closing(self.billing.store, found.id, actor.name)
        return self.as_shown(actor, await self.accounts.get(found.id))

    async def terminate_account(
        self, actor: Actor, body: Termination, account: str
    ) -> AccountTerminated:
        """Terminate an account: revoke its keys, abort its requests, close its logins, and later,
        or `now`, erase what identifies it. This can't be undone."""
        result: AccountTerminated | None = None
        async for each in self._terminate(actor, body, account):
            if isinstance(each, AccountTerminated):
                result = each
        assert result is not None, "it is the last one"
        return result

    async def stream_termination(
        self, actor: Actor, body: Termination, account: str
    ) -> AsyncIterator[bytes]:
        """Yield the progress of `terminate_account` and then its result, each as a line of JSON."""
        async for each in self._terminate(actor, body, account):
            yield msgspec.json.encode(each) + b"\n"

    async def _terminate(
        self, actor: Actor, body: Termination, account: str
    ) -> AsyncIterator[ErasureProgress | AccountTerminated]:
        store = self.billing.store
        found = await self.find_account(actor, account)
        days = 0 if body.now else self.gateway.settings.retention.terminated_account_days
        erase_at = store.time() + days * DAY
        cut = 0
        if found.status == "terminated":
            cut = await self.gateway.abort_account(found.id)  # an earlier call may have failed
            check_again(found, body)
        if body.preview:
            found.erase_at = json_time(erase_at)
            yield await self._terminated(found, found, 0, "", done=False)
            return
        if found.status == "terminated":
            await erase_now(store, found.id, actor.name)
        else:
            await terminate(store, found.id, erase_at, actor.name)
            cut = await self.gateway.abort_account(found.id)
        missing = ""
        if erase_at <= store.time():
            try:
                async for each in self._erase(found, actor):
                    if isinstance(each, ErasureProgress):
                        yield each
                    else:
                        missing = each.missing
            except StorageUnavailable as error:  # it is too late for an error response
                missing = str(error)
        yield await self._terminated(found, await self.accounts.get(found.id), cut, missing)

    def _erase(self, account: Account, actor: Actor) -> AsyncIterator[ErasureProgress | ErasureEnd]:
        store, end = self.billing.store, self.gateway.end_account
        return erase_account(store, self.request_log, account.id, end, actor.name)

    async def _terminated(
        self, before: Account, account: Account, cut: int, missing: str, *, done: bool = True
    ) -> AccountTerminated:
        return AccountTerminated(
            account=account.name,
            account_id=account.id,
            done=done,
            keys=before.keys_in_force,
            cut=cut,
            terminated_at=account.terminated_at,
            erase_at=account.erase_at,
            erased_at=account.erased_at,
            missing=missing,
            copies=await asyncio.to_thread(copies_beside, self.billing.store.path),
        )


def check_again(account: Account, body: Termination) -> None:
    """Raise Conflict if there is nothing left that terminating the account again could do."""
    if account.erased_at:
        raise Conflict(f"account {account.name!r} was erased at {account.erased_at}")
    if not body.now:
        raise Conflict(
            f"account {account.name!r} is terminated already; it will be erased at "
            f"{account.erase_at}, or at once with 'now'"
        )
