"""Operations on accounts and their API keys."""

from __future__ import annotations

import re
from typing import Any

from msgspec.structs import asdict

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import (
    AccountChange,
    AccountsQuery,
    NewAccount,
    NewKey,
    Revocation,
    Rotation,
    Suspension,
    Throttle,
)
from redbtc.admin.outputs import AccountList, AccountWithMoney, KeyList, KeyRevoked
from redbtc.admin.validation import limits_in, models_in, time_in
from redbtc.billing.overviews import list_accounts
from redbtc.errors import UserError
from redbtc.money import NANOS, parse_amount
from redbtc.store.accounts import Account, KeyAdded
from redbtc.times import parse_duration

ACCOUNT_ID = re.compile(r"acct_[0-9a-f]{16}")


class AccountOperations(Access):
    """Operations on accounts and their API keys."""

    async def _with_money(self, account: Account, actor: Actor) -> AccountWithMoney:
        """Return the account with its money."""
        money = await self.billing.balance(account)
        return AccountWithMoney(
            **asdict(self.as_shown(actor, account)),
            balance=money.balance,
            held=money.held,
            available=money.available,
            month=money.month,
            spent_this_month=money.spent_this_month,
            currency=money.currency,
        )

    async def list_accounts(self, actor: Actor, query: AccountsQuery) -> AccountList:
        """List accounts, or search them."""
        return AccountList(
            await list_accounts(self.billing, query.search, query.after, query.limit or -1)
        )

    async def add_account(self, actor: Actor, body: NewAccount) -> AccountWithMoney:
        """Create an account."""
        if ACCOUNT_ID.fullmatch(body.name):  # it could be mistaken for another account's id
            raise UserError(f"name {body.name!r} looks like an account id; choose another one")
        limits = limits_in(body)
        account = await self.accounts.add(body.name, body.email, limits, actor.name)
        return await self._with_money(account, actor)

    async def show_account(self, actor: Actor, account: str) -> AccountWithMoney:
        """Show an account, by name or id."""
        found = await self.find_account(actor, account)
        return await self._with_money(found, actor)

    async def set_account(
        self, actor: Actor, body: AccountChange, account: str
    ) -> AccountWithMoney:
        """Change an account. Takes effect on its next request."""
        found = await self.find_account(actor, account)
        changed = await self.accounts.set(found.id, limits_in(body), actor.name)
        return await self._with_money(changed, actor)

    async def suspend_account(self, actor: Actor, body: Suspension, account: str) -> Account:
        """Suspend an account: refuse its requests and log its members out."""
        found = await self.find_account(actor, account)
        return await self.accounts.suspend(found.id, body.reason, actor.name)

    async def resume_account(self, actor: Actor, account: str) -> Account:
        """Resume a suspended account."""
        found = await self.find_account(actor, account)
        return await self.accounts.resume(found.id, actor.name)

    async def throttle_account(self, actor: Actor, body: Throttle, account: str) -> Account:
        """Temporarily reduce an account's limits."""
        found = await self.find_account(actor, account)
        factor = parse_amount(body.factor if body.factor[0] != "." else f"0{body.factor}")
        now = self.billing.store.time()
        until = time_in(body.until, now)
        if until is not None and until <= now:
            raise UserError("until must be later than now")
        thousandths = factor // (NANOS // 1000)
        if thousandths == 1000:
            return await self.accounts.throttle(found.id, None, None, actor.name)
        return await self.accounts.throttle(found.id, thousandths, until, actor.name)

    async def account_limits(self, actor: Actor, account: str) -> dict[str, Any]:
        """Show an account's current limits and what is left of them, while the gateway runs."""
        found = await self.find_account(actor, account)
        return self.gateway.limits_of_account(found)

    async def list_keys(self, actor: Actor, account: str) -> KeyList:
        """List an account's keys."""
        found = await self.find_account(actor, account)
        return KeyList(await self.accounts.keys(found.id))

    async def add_key(self, actor: Actor, body: NewKey, account: str) -> KeyAdded:
        """Create a key. It is shown only once."""
        found = await self.find_account(actor, account)
        limits, models = limits_in(body), models_in(body.models)
        expires = time_in(body.expires, self.billing.store.time())
        return await self.accounts.add_key(
            found.id, body.label, expires, limits, actor.name, models
        )

    async def revoke_key(self, actor: Actor, body: Revocation, key: str) -> KeyRevoked:
        """Revoke a key. Takes effect on its next request."""
        found = await self.find_key(actor, key)
        revoked = await self.accounts.revoke_key(found.id, body.compromised, actor.name)
        cut = self.gateway.abort_key(found.id) if body.compromised else 0
        return KeyRevoked(**asdict(revoked), cut=cut)

    async def rotate_key(self, actor: Actor, body: Rotation, key: str) -> KeyAdded:
        """Replace a key with a new one. The old one stops working after the overlap; both share one
        budget."""
        found = await self.find_key(actor, key)
        overlap = 0 if body.overlap == "0" else parse_duration(body.overlap)
        return await self.accounts.rotate_key(found.id, overlap, actor.name)
