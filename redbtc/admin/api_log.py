"""Operations on the request log: whose requests are logged, and what is stored of a request.

Rule 1. The owner decides. An operator may switch logging on, or keep bodies for longer, only for an
account in which nobody is an owner. An operator may always switch it off and erase what is stored.

Rule 2. In a browser only an owner reads bodies. A command may read them too: it is given by a user
who could open the file itself. Each reading is in the log of changes before a byte is handed out.
"""

from __future__ import annotations

import contextlib

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor, Forbidden
from redbtc.admin.inputs_log import RequestLogChange
from redbtc.admin.outputs_log import (
    BodyContent,
    BodyReading,
    LoggedKey,
    RequestDetails,
    RequestLogShown,
    StoredBodies,
    StoredBody,
)
from redbtc.admin.users import is_members_name
from redbtc.billing.reports import one_request
from redbtc.errors import Conflict, NotFound, StorageUnavailable
from redbtc.store.accounts import Account, KeyShown, no_key
from redbtc.store.json_values import json_time
from redbtc.store.log_settings import BodyName, Changed, LogSettings
from redbtc.store.request_log import LoggedRequest

MAX_SHOWN_READINGS = 20  # that are shown
BODY_NAMES: tuple[BodyName, ...] = ("request", "response")


class RequestLogOperations(Access):
    """Operations on the request log."""

    @property
    def _log_settings(self) -> LogSettings:
        return LogSettings(self.billing.store)

    async def show_request_log(self, actor: Actor, account: str) -> RequestLogShown:
        """Show whether bodies of an account's requests are kept, and who has read them."""
        return await self._log_of(actor, await self.find_account(actor, account))

    async def _log_of(self, actor: Actor, account: Account) -> RequestLogShown:
        def who(name: str) -> str:
            """Members are not told the names of operators."""
            is_shown = actor.rank == "operator" or is_members_name(name, account.name)
            return name if is_shown else "an operator"

        changed = {
            each: Changed(at, who(by))
            for each, (at, by) in (await self._log_settings.changed(account.id)).items()
        }
        of_account = changed.get(account.id)
        keys = [key for key in await self.accounts.keys(account.id) if key.log_days is not None]
        stored = None
        with contextlib.suppress(StorageUnavailable):  # the setting is shown in any case
            stored = await self.request_log.count_of(account.id)
        readings = await self._log_settings.readings(account.id, MAX_SHOWN_READINGS)
        return RequestLogShown(
            account=account.name,
            account_id=account.id,
            log_days=account.log_days,
            set_at=of_account.at if of_account else None,
            set_by=of_account.by if of_account else None,
            keys=[
                LoggedKey(key.id, key.label, key.log_days, *(changed.get(key.id) or (None, None)))
                for key in keys
                if key.log_days is not None
            ],
            max_days=self.gateway.settings.retention.request_log_days_max,
            has_owner=await self._log_settings.has_owner(account.id),
            requests=stored.requests if stored else None,
            oldest=json_time(stored.oldest) if stored and stored.oldest is not None else None,
            readings=[
                BodyReading(each.at, who(each.by), each.request_id, each.body) for each in readings
            ],
        )

    async def set_request_log(
        self, actor: Actor, body: RequestLogChange, account: str
    ) -> RequestLogShown:
        """Keep bodies of an account's requests, or of one of its keys, or keep none. Takes effect
        on the next request."""
        found, key = await self.find_account(actor, account), None
        if body.key is not None:
            key = await self.find_key(actor, body.key)
            if key.account_id != found.id:
                raise no_key(body.key)
        if body.days is not None:
            if body.purge:
                raise Conflict("`purge` erases what is stored, which needs `days` null")
            await self._switch_on(actor, body.days, found, key)
            return await self._log_of(actor, await self.find_account(actor, found.id))
        await self._switch_off(actor, found, key)
        erased = await self._erase_bodies(actor, found, key) if body.purge else None
        shown = await self._log_of(actor, await self.find_account(actor, found.id))
        if erased is not None:
            shown.erased_requests = erased
        return shown

    async def _switch_on(
        self, actor: Actor, days: int, account: Account, key: KeyShown | None
    ) -> None:
        """Keep bodies for so many days, those that are stored already for no longer than that.
        Raises UserError."""
        maximum = self.gateway.settings.retention.request_log_days_max
        if maximum == 0:
            raise Conflict(
                "request logging is not available here: retention.request_log_days_max is 0"
            )
        if days > maximum:
            at_most = f"{maximum} days at most (retention.request_log_days_max)"
            raise Conflict(f"`days` is {days}, but bodies can be kept for {at_most}")
        if account.status == "terminated":
            raise Conflict(f"account {account.name!r} is terminated; its requests can't be logged")
        before = account.log_days
        if key and key.log_days is not None:
            before = key.log_days
        if actor.rank == "operator" and (before is None or days > before):
            await self._leave_to_owner(account)
        key_id = key.id if key else None
        await self._log_settings.set(account.id, key_id, days, actor.name)
        own = [each.id for each in await self.accounts.keys(account.id) if each.log_days]
        await self.request_log.shorten(account.id, key_id, days, () if key_id else own)
        await self.request_log.purge(self.billing.store.time())

    async def _leave_to_owner(self, account: Account) -> None:
        """Raise Forbidden if the account has an owner, who alone may decide this."""
        if await self._log_settings.has_owner(account.id):
            page = f"{self.dashboard_url}accounts/{account.id}/settings"
            raise Forbidden(
                f"account {account.name!r} has an owner, so only its owner can switch request "
                f"logging on or keep bodies for longer, on the settings page: {page}"
            )

    async def _switch_off(self, actor: Actor, account: Account, key: KeyShown | None) -> None:
        """Keep no bodies of further requests. Raises Conflict for a key whose account is logged."""
        if key and account.log_days is not None:
            raise Conflict(
                f"all requests of account {account.name!r} are logged, so those of a key can't be "
                "left out; switch logging off for the account and on for single keys"
            )
        await self._log_settings.clear(account.id, key.id if key else None, actor.name)

    async def _erase_bodies(self, actor: Actor, account: Account, key: KeyShown | None) -> int:
        """Erase what is stored. Return of how many requests."""
        key_id = key.id if key else None
        erased = (await self.request_log.erase(account.id, key_id)).requests
        await self._log_settings.note_erasure(account.id, key_id, erased, actor.name)
        return erased

    async def show_request(self, actor: Actor, request: str) -> RequestDetails:
        """Show a request, and whether its bodies are stored."""
        found = await one_request(
            self.billing.store, request, actor.account_id, self.billing.currency
        )
        if actor.rank == "viewer":
            return RequestDetails(found, None)
        stored = await self.request_log.read(request)
        return RequestDetails(found, stored_bodies(stored) if stored else None)

    async def read_stored_body(self, actor: Actor, request: str, body: str) -> BodyContent:
        """Read a stored body, `request` or `response`. The reading is written to the log of
        changes."""
        await one_request(self.billing.store, request, actor.account_id, self.billing.currency)
        if actor.rank == "operator" and not actor.is_command:
            raise Forbidden(
                "only the owner of an account can read bodies in a browser; on the gateway's "
                "machine, use: redbtc-proxy usage show REQUEST_ID --request or --response"
            )
        name = next((each for each in BODY_NAMES if each == body), None)
        if name is None:
            raise NotFound(f"a request has no body {body!r}, only 'request' and 'response'")
        stored = await self.request_log.read(request)
        if stored and getattr(stored, f"{name}_withheld"):
            raise NotFound(
                f"the {name} body of {request} is not stored, since a key or a credential is in it"
            )
        content = getattr(stored, name) if stored else None
        if stored is None or content is None:
            raise NotFound(f"nothing is stored of the {name} body of {request}")
        await self._log_settings.note_reading(stored.account_id, request, name, actor.name)
        return BodyContent(content, getattr(stored, f"{name}_encoding"))


def stored_bodies(stored: LoggedRequest) -> StoredBodies:
    """Return what an answer says of stored bodies, without their content."""

    def shown(name: BodyName) -> StoredBody | None:
        content, withheld = getattr(stored, name), getattr(stored, f"{name}_withheld")
        if content is None and not withheld:
            return None
        size = getattr(stored, f"{name}_bytes")
        encoding = getattr(stored, f"{name}_encoding")
        return StoredBody(size, len(content or b""), encoding, withheld)

    return StoredBodies(
        json_time(stored.logged_at),
        json_time(stored.expires_at),
        stored.is_complete,
        shown("request"),
        shown("response"),
    )
