"""Look up accounts, keys and users as far as an actor may know of them."""

from __future__ import annotations

import asyncio

from msgspec import UNSET
from msgspec.structs import asdict, replace

from redbtc.admin.actors import Actor, RunningGateway
from redbtc.admin.inputs import WhichUser
from redbtc.admin.outputs import AccountWithMoney
from redbtc.admin.users import Users, UserShown
from redbtc.billing.billing import Billing
from redbtc.errors import NotFound
from redbtc.store.accounts import Account, Accounts, KeyShown, no_account, no_key
from redbtc.store.request_log import RequestLog
from redbtc.store.retention import Retention


class Access:
    """The base of all operations: what they work on, and how they look up what a path or a query
    names. Another account's account, key or user gets the same 404 as one that does not exist.

    `public_url` is where browsers and clients find the gateway."""

    def __init__(
        self,
        billing: Billing,
        gateway: RunningGateway,
        public_url: str,
        request_log: RequestLog,
    ) -> None:
        self.billing = billing
        self.gateway = gateway
        self.request_log = request_log
        self.accounts = Accounts(billing.store)
        self.retention = Retention(billing.store, request_log)
        self.users = Users(billing.store)
        self.exporting = asyncio.Lock()  # exports take turns, so that many take no more than one
        self.public_url = public_url.rstrip("/")
        self.dashboard_url = f"{self.public_url}/dashboard/"

    async def find_account(self, actor: Actor, account: str | None = None) -> Account:
        """Return an account by name or id (None: the actor's own). Raises NotFound."""
        if account is None:
            account = actor.required_account_id()
        found = await self.accounts.get(account)
        if actor.account_id not in (None, found.id):
            raise no_account(account)
        return found

    def as_shown(self, actor: Actor, account: Account) -> Account:
        """Return an account as the actor may see it: only operators see why it is suspended."""
        return account if actor.rank == "operator" else replace(account, status_reason=UNSET)

    async def with_money(self, account: Account, actor: Actor) -> AccountWithMoney:
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

    async def find_key(self, actor: Actor, key: str) -> KeyShown:
        """Return a key by its id. Raises NotFound."""
        found = await self.accounts.key(key)
        if actor.account_id not in (None, found.account_id):
            raise no_key(key)
        return found

    async def find_user(self, actor: Actor, query: WhichUser, user: str) -> UserShown:
        """Return a user by id or email address. Of several users of one address, a member means,
        and learns of, only the one in their own account. Raises NotFound, or Conflict if an
        operator must choose."""
        no_user = NotFound(f"user {user!r} does not exist")
        account, operator = query.account, query.operator
        if actor.account_id is not None:
            own = await self.accounts.get(actor.account_id)
            if operator or account not in (None, own.name):
                raise no_user
            account = own.name
        found = await self.users.named(user, account, operator)
        if actor.account_id not in (None, found.account_id):
            raise no_user
        return found
