"""Define the input of the operations on the request log."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from redbtc.admin.inputs import Filter, Input


class RequestLogChange(Input):
    """Whether bodies of requests are kept. `days` is for how long, from 1 to the setting
    retention.request_log_days_max; null keeps none of further requests. With `key`, the id of one
    of the account's keys, only the requests of that key are meant. `purge`, only with null, also
    erases what is stored; otherwise that stays until it expires."""

    days: Annotated[int, Meta(ge=1)] | None
    key: Filter | None = None
    purge: bool = False
