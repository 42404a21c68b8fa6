"""The objects that upstreams store, and the accounts that own them."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import orjson

from redbtc.locations import ObjectLocation
from redbtc.store.database import Store
from redbtc.store.request_sql import MAX_ROWS

# All accounts share the upstream's key, and with it all that the upstream stores. An account may
# name only objects that the upstream made for it; those that were made with a client's own
# credential (its digest is in the location) only together with that credential. Objects are known
# from the first event that names them. An id that the client itself chose, and the upstream only
# repeats, is never learned.
#
# The first account for which an object is recorded owns it. The row decides; a claim that waits for
# its commit decides only where there is no row. Claims are written in the order in which they are
# made, and only the first one for an id counts, so the answer is at every instant the one that the
# store will give after a restart.
OWN = """
    INSERT INTO stored_objects
           (id, account_id, upstream, models, minted_input, extras, tokens, likely_tokens,
            credential, created_at)
    VALUES {rows}
        ON CONFLICT (id) DO UPDATE SET models = joined(models, excluded.models),
           extras = extras | excluded.extras,
           tokens = coalesce(max(tokens, excluded.tokens), tokens, excluded.tokens),
           likely_tokens = coalesce(excluded.likely_tokens, likely_tokens)
        WHERE account_id = excluded.account_id AND credential IS excluded.credential
          AND (excluded.models IS NOT NULL OR excluded.extras OR excluded.tokens IS NOT NULL)"""
DISOWN = "DELETE FROM stored_objects WHERE id = ? AND account_id = ? AND credential IS ?"
LOCATION_COLUMNS = "upstream, models, minted_input, extras, tokens, likely_tokens, credential"
OWNED = f"SELECT account_id, {LOCATION_COLUMNS} FROM stored_objects WHERE id = ?"
OWNERS = f"""
    SELECT id, account_id, {LOCATION_COLUMNS} FROM stored_objects
     WHERE id IN (SELECT value FROM json_each(?))"""
MAX_LOOK_UPS = 250  # ids in one query, which takes about 1 ms
MAX_LISTED = 1000  # ids of an account that are remembered as shown in listings


class Claim(NamedTuple):
    """An object's owner, and where the object is stored."""

    account_id: str
    location: ObjectLocation

    def is_owner(self, account_id: str, credential: str | None) -> bool:
        """Return whether the object belongs to an account, and can be named with a credential: the
        one that it was stored with, or any if that was the operator's."""
        stored_with = self.location.credential
        return self.account_id == account_id and stored_with in (None, credential)

    def is_same(self, other: Claim) -> bool:
        """Return whether another claim is of the same account and credential."""
        mine = self.account_id, self.location.credential
        return mine == (other.account_id, other.location.credential)

    def joined(self, later: Claim) -> Claim:
        """Return the same claim, or one that adds to it what a later claim of the same account and
        credential says."""
        location = self.location.joined(later.location)
        if not self.is_same(later) or location == self.location:
            return self
        return Claim(self.account_id, location)


@functools.lru_cache(MAX_ROWS)
def own_of(rows: int) -> str:
    """Return OWN for a number of objects at once."""
    return OWN.format(rows=", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * rows))


def decided(row: Sequence[Any] | None, claim: Claim | None) -> Claim | None:
    """Return the owner of an object, given its row of OWNED and the claim that waits for its
    commit; None if it has neither."""
    if row is None:
        return claim
    account_id, upstream, models, minted_input, *rest = row
    owner = Claim(account_id, ObjectLocation(upstream, models, bool(minted_input), *rest))
    return owner.joined(claim) if claim else owner


class Objects:
    """The accounts that own the objects stored at the upstreams, and the objects' locations."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._claims: dict[str, Claim] = {}  # by object, those not known to be committed
        # By account, pairs of a response and an item that its listing showed, latest last.
        self._listed: defaultdict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        self._growing: Counter[str] = Counter()  # by object, the tokens of `grow`

    def own(self, ids: Iterable[str], account_id: str, location: ObjectLocation) -> None:
        """Make the objects the account's, except for those that are another account's already."""
        self.own_each(dict.fromkeys(ids, location), account_id)

    def own_each(self, locations: Mapping[str, ObjectLocation], account_id: str) -> None:
        """Make each of these objects the account's, as `own` does."""
        now, claims, values = self._store.time(), {}, []
        for each, location in locations.items():
            before, claim = self._claims.get(each), Claim(account_id, location)
            if before is None or before.is_same(claim):
                self._claims[each] = claims[each] = claim = (
                    before.joined(claim) if before else claim
                )
            if claim is not before:  # nothing in it is new
                values.append((each, account_id, *claim.location, now))
        for at in range(0, len(values), MAX_ROWS):
            rows = values[at : at + MAX_ROWS]
            row = list(chain(*rows))
            written = self._store.record(
                own_of(len(rows)), row, retry_until_written=True, durable=False
            )
        if values:
            written.add_done_callback(functools.partial(self._written, claims))

    def _written(self, claims: dict[str, Claim], _: asyncio.Future[None]) -> None:
        for each, claim in claims.items():
            if self._claims.get(each) is claim:
                del self._claims[each]

    def _owned(self, object_id: str) -> Claim | None:
        row = self._store.look_up(OWNED, (object_id,))
        return decided(row, self._claims.get(object_id))

    def location_of(
        self, object_id: str, account_id: str, credential: str | None = None
    ) -> ObjectLocation | None:
        """Return where the object is, None unless it is the account's and was stored with the
        operator's credential or this one. Costs one read by an index, which takes as long for
        another account's object as for one that does not exist. Raises StorageUnavailable."""
        owned = self._owned(object_id)
        return owned.location if owned and owned.is_owner(account_id, credential) else None

    def look_up(
        self, ids: Collection[str], account_id: str, credential: str | None
    ) -> dict[str, ObjectLocation | None]:
        """Return, by id, where an object is stored that `location_of` would find, and None for
        another account's or credential's object. Ids of unknown objects are left out. Takes one
        query; at most MAX_LOOK_UPS ids. Raises StorageUnavailable."""
        names = orjson.dumps(list(ids)).decode()
        rows = {row[0]: row[1:] for row in self._store.look_up_all(OWNERS, (names,))}
        found: dict[str, ObjectLocation | None] = {}
        # Equal locations are one object, so that few are kept.
        locations: dict[ObjectLocation, ObjectLocation] = {}
        for each in ids:
            if owned := decided(rows.get(each), self._claims.get(each)):
                location = locations.setdefault(owned.location, owned.location)
                found[each] = location if owned.is_owner(account_id, credential) else None
        return found

    def is_free(self, object_id: str) -> bool:
        """Return whether no account owns the object. Raises StorageUnavailable."""
        return self._owned(object_id) is None

    async def disown(self, object_id: str, account_id: str, credential: str | None = None) -> None:
        """Forget an object that the account deleted with the credential that it was stored with,
        and a claim that another account made in vain, which would take effect now."""
        self._claims.pop(object_id, None)
        values = (object_id, account_id, credential)
        await self._store.record(DISOWN, values, retry_until_written=True)

    def grow(self, growth: Mapping[str, int]) -> None:
        """Note that a request which has not ended can add so many tokens to each of these objects:
        nobody knows yet how many, but the upstream may have added them already."""
        self._growing.update(growth)

    def stop_growing(self, growth: Mapping[str, int]) -> None:
        """Undo `grow` when the request has ended."""
        for each, tokens in growth.items():
            self._growing[each] -= tokens
            if not self._growing[each]:
                del self._growing[each]

    def growing(self) -> dict[str, int]:
        """Return what `growth_of` does for each object for which it is not 0."""
        return dict(self._growing)

    @property
    def are_writing(self) -> bool:
        """Return whether the ledger may lack something of what this process knows of objects."""
        return bool(self._claims)

    def growth_of(self, object_id: str) -> int:
        """Return how many tokens requests that have not ended can add to an object."""
        return self._growing[object_id]

    def note_listed(self, ids: Iterable[str], response_id: str, account_id: str) -> None:
        """Remember that the account saw these ids in the listing of its response's input: it may
        page from them even if it does not own them."""
        listed = self._listed[account_id]
        for each in ids:
            listed.pop((response_id, each), None)
            listed[response_id, each] = None
        while len(listed) > MAX_LISTED:
            del listed[next(iter(listed))]

    def forget_listed(self, account_id: str) -> None:
        """Forget what `note_listed` has remembered for an account."""
        self._listed.pop(account_id, None)

    def was_listed(self, object_id: str, response_id: str, account_id: str) -> bool:
        """Return whether the account recently saw the id in the listing of the response's input."""
        return (response_id, object_id) in self._listed.get(account_id, ())
