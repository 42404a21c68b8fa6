"""The inputs of operations that close accounts, and their results."""

from __future__ import annotations

from msgspec import Struct

from redbtc.admin.inputs import Input
from redbtc.store.json_values import Moment


class Termination(Input):
    """How to terminate an account. `now`: erase what identifies it at once. `preview`: change
    nothing, and only return what would be done."""

    now: bool = False
    preview: bool = False


class AccountTerminated(Struct):
    """The state of a terminated account. `keys` keys were revoked, and `cut` requests in flight
    were aborted. If `done` is false, this was a preview.

    What identifies the account is erased at `erase_at`. If that has come and `erased_at` is null,
    `missing` says what is left to be done. `copies` are files beside the database that may have the
    account's data; the gateway does not change them."""

    account: str
    account_id: str
    done: bool
    keys: int
    cut: int
    terminated_at: Moment | None
    erase_at: Moment | None
    erased_at: Moment | None
    missing: str
    copies: list[str]
