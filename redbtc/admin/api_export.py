"""Operations that export what is stored of an account."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterable
from typing import Annotated

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor, Forbidden, Invalid
from redbtc.admin.export_files import AccountExport
from redbtc.admin.inputs import Input, Time, matching
from redbtc.admin.outputs import AccountWithMoney
from redbtc.admin.zip_stream import ExportedFile, ManifestHead, zip_parts
from redbtc.errors import Conflict, NotFound
from redbtc.store.json_values import json_time
from redbtc.times import MONTH, now_ms, parse_time

EXPORT_PART = re.compile(rf"account|statements|content|usage-({MONTH.pattern})")
CONTENT_AT_ONCE = 100  # requests whose stored content is one part
ACCOUNT_FILES = 17  # of the part `account`
ID_OF_REQUEST = "req_[0-9a-f]{32}"
# A request for stored content is in the log of changes once for each export and actor.
NOTE_CONTENT_EXPORT = """
    INSERT INTO changes
    SELECT NULL, at, name, 'request_log', ?1, ?1, NULL, json_object('exported_as_of', ?2)
      FROM acting
     WHERE NOT EXISTS (SELECT 1 FROM changes
                        WHERE account_id = ?1 AND kind = 'request_log' AND changed_by = name
                          AND json_extract(after, '$.exported_as_of') = ?2)"""
RequestIds = Annotated[
    str,
    matching(
        rf"^({ID_OF_REQUEST}(,{ID_OF_REQUEST}){{0,{CONTENT_AT_ONCE - 1}}})?$(?!\n)",
        f"at most {CONTENT_AT_ONCE} request ids, separated by commas",
    ),
]


class InstantQuery(Input):
    """The instant of an export: what was added then or later is left out. The default is now."""

    as_of: Time | None = None


class PartQuery(InstantQuery):
    """The instant of an export, and for the part `content` the ids of the requests."""

    requests: RequestIds = ""


class PlannedPart(Struct):
    """A part of an export, and the number of its files. `requests` are those whose stored content
    is in a part `content`; then `files` is the most that it can have."""

    name: str
    files: int
    requests: list[str] | UnsetType = UNSET


class ExportPlan(ManifestHead):
    """An export that can be fetched part by part. If `with_content` is false, stored content of
    requests is left out: it is for the account's owner."""

    parts: list[PlannedPart]


class ExportOperations(Access):
    """Operations that export what is stored of an account."""

    async def plan_export(self, actor: Actor, query: InstantQuery, account: str) -> ExportPlan:
        """List the parts of an export of an account."""
        found, as_of = await self._exported(actor, account, query.as_of)
        head = manifest_head(actor, found, as_of)
        parts = await self._parts(found, as_of, head.with_content)
        return ExportPlan(**asdict(head), parts=parts)

    async def export_part(
        self, actor: Actor, query: PartQuery, account: str, part: str
    ) -> AsyncIterator[bytes]:
        """Return a part of an export as a ZIP archive."""
        found, as_of = await self._exported(actor, account, query.as_of)
        if not EXPORT_PART.fullmatch(part):
            raise NotFound(f"an export has no part {part!r}")
        wanted = PlannedPart(part, 0, query.requests.split(",") if query.requests else [])
        if part == "content":
            if not may_have_content(actor):
                raise Forbidden(
                    "only the owner of an account can export stored content in a browser; on the "
                    "gateway's machine, use: redbtc-proxy account export NAME --to FILE.zip"
                )
            if wanted.requests:
                await self._note_content(actor, found, as_of)
        files = files_of(AccountExport(self, found, as_of), [wanted])
        return in_turn(self.exporting, zip_parts(files, as_of))

    async def export_account(self, actor: Actor, account: str) -> AsyncIterator[bytes]:
        """Return all that is stored of an account as a ZIP archive with a manifest."""
        found, as_of = await self._exported(actor, account, None)
        head = manifest_head(actor, found, as_of)
        parts = await self._parts(found, as_of, head.with_content)
        if parts[-1].requests:
            await self._note_content(actor, found, as_of)
        files = files_of(AccountExport(self, found, as_of), parts)
        return in_turn(self.exporting, zip_parts(files, as_of, head))

    async def _exported(
        self, actor: Actor, account: str, as_of: str | None
    ) -> tuple[AccountWithMoney, int]:
        """Return an account as its owner may see it, and the instant of its export. Raises
        NotFound; Conflict if the account was erased; Invalid for an instant in the future."""
        found = await self.find_account(actor, account)
        if found.erased_at is not None:
            raise Conflict(f"account {found.name!r} was erased: nothing is left to export")
        store = self.billing.store
        if as_of is None:
            at = await store.settle_time()  # so that it is no time to come after a restart
        else:
            at = parse_time(as_of, store.time(), relative_to_past=True)
        if at > store.time():
            raise Invalid("the instant of an export can't be in the future", "as_of")
        owner = Actor(actor.name, "owner", found.id)
        return await self.with_money(found, owner), at

    async def _parts(
        self, account: AccountWithMoney, as_of: int, with_content: bool
    ) -> list[PlannedPart]:
        export = AccountExport(self, account, as_of)
        months = len(await export.statement_months())
        parts = [PlannedPart("account", ACCOUNT_FILES), PlannedPart("statements", 2 * months)]
        parts += [PlannedPart(f"usage-{month}", 2) for month in await export.usage_months()]
        ids = iter(await self.request_log.ids_of(account.id) if with_content else [])
        while some := list(itertools.islice(ids, CONTENT_AT_ONCE)):
            parts.append(PlannedPart("content", 2 * len(some), some))
        return parts

    async def _note_content(self, actor: Actor, account: AccountWithMoney, as_of: int) -> None:
        """Write into the log of changes that stored content is about to be exported."""
        values = (account.id, json_time(as_of))
        await self.billing.store.transact((NOTE_CONTENT_EXPORT, values), by=actor.name)


def may_have_content(actor: Actor) -> bool:
    """Return whether an export may include stored content: Rule 2 of admin/api_log.py. It does not
    depend on whether the account has an owner, whom an operator could remove first."""
    return actor.is_command or actor.rank == "owner"


def manifest_head(actor: Actor, account: AccountWithMoney, as_of: int) -> ManifestHead:
    """Return the head of an export's manifest."""
    return ManifestHead(
        account=account.name,
        account_id=account.id,
        as_of=json_time(as_of),
        made_at=json_time(now_ms()),
        made_by=actor.name,
        with_content=may_have_content(actor),
    )


async def files_of(
    export: AccountExport, parts: Iterable[PlannedPart]
) -> AsyncIterator[ExportedFile]:
    """Yield the files of these parts of an export."""
    for part in parts:
        if part.name == "account":
            files = export.account_files()
        elif part.name == "statements":
            files = export.statement_files()
        elif part.name == "content":
            files = export.content_files(part.requests or [])
        else:
            files = export.usage_files(part.name.removeprefix("usage-"))
        async for file in files:
            yield file


async def in_turn(turn: asyncio.Lock, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the parts of an export, each made in turn with those of other exports: together they
    take the event loop no more time than one. A client that reads slowly holds no turn."""
    while True:
        async with turn:
            part = await anext(parts, None)
        if part is None:
            return
        yield part
