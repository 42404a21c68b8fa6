"""Codex CLI's model catalogue, as each key gets it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2

from redbtc.billing.billing import Billing
from redbtc.codex.catalog import (
    MAX_BODY,
    CatalogError,
    CatalogModel,
    etag_of,
    parse_catalog,
    read_catalog,
    size_of,
)
from redbtc.codex.model_info import MEASURED_VERSION
from redbtc.config import CodexSettings, is_web_address
from redbtc.store.keys import Key
from redbtc.telemetry import log
from redbtc.upstream.configured import Upstreams
from redbtc.upstream.failures import cause_of
from redbtc.upstream.upstreams import Upstream
from redbtc.upstream_settings import UpstreamSettings

REFRESH_SECONDS = 300  # between two fetches of a catalogue at a URL
FETCH_AGAIN_SECONDS = 10  # after one that has failed
SELECTION_SECONDS = 60  # for which a selection is used, since prices take effect with time
MAX_SELECTIONS = 1000
NOT_FETCHED = "model catalog not fetched"
MODELS_ETAG = b"x-models-etag"  # the header of a response with the ETag of the catalogue


class Selection(NamedTuple):
    """The models of the catalogue that a key gets, and the ETag of that."""

    models: tuple[CatalogModel, ...]
    etag: bytes
    prices: object  # the price table with which they were selected
    until: float


class ModelCatalog:
    """The catalogue of the settings `codex.catalog`, less the models that a key may not use, that
    no upstream serves or that have no price. Keys with the same patterns of models share a
    selection. A catalogue at a URL is fetched in the background, and the last good one is used."""

    def __init__(self, settings: CodexSettings, billing: Billing, upstreams: Upstreams) -> None:
        """Raises SettingsError if the file can't be read."""
        self._billing = billing
        self._upstreams = upstreams
        self._models = read_catalog(settings.catalog)
        self._fetched = b""  # the bytes of the catalogue that was fetched last
        self._selections: dict[tuple[str | None, bool], Selection] = {}
        self._changed = asyncio.Event()  # the place is a URL that is to be fetched now
        self._logged: set[str] = set()  # the problems that were logged, and are not over
        self._set_place(settings.catalog)

    @property
    def models(self) -> tuple[CatalogModel, ...] | None:
        """The models of the catalogue; None if none is set, or none has been fetched yet."""
        return self._models

    def apply(self, settings: CodexSettings, models: tuple[CatalogModel, ...] | None) -> None:
        """Use other settings, and the models that `read_catalog` has found there. A catalogue at a
        URL is fetched, also if that is the same as before; until then the one from before stays in
        use."""
        if models is not None or not settings.catalog:  # else it has to be fetched
            self._models, self._fetched = models, b""
        self._selections.clear()  # the upstreams may serve other models, too
        self._set_place(settings.catalog)

    def _set_place(self, place: str) -> None:
        self._place = place
        self.is_set = bool(place)
        self._logged.clear()
        if is_web_address(place):
            self._changed.set()

    def selection(self, key: Key, with_credential: bool) -> Selection | None:
        """Return what a key gets, None if no catalogue is set or none has been fetched yet.
        `with_credential`: the client has sent its own, with which it can use other upstreams."""
        found = self._selections.get((key.models, with_credential))
        if (
            found is None
            or found.prices is not self._billing.prices
            or found.until < time.monotonic()
        ):
            if self._models is None:
                return None
            found = self._select(self._models, key, with_credential)
        return found

    def _select(
        self, models: tuple[CatalogModel, ...], key: Key, with_credential: bool
    ) -> Selection:
        upstreams = self._upstreams.shown_to(with_credential)

        def is_usable(name: str) -> bool:
            is_free = with_credential and self._upstreams.are_free(name)
            has_price = is_free or self._billing.may_serve(name)
            return key.allows(name) and has_price and any(each.serves(name) for each in upstreams)

        chosen = tuple(each for each in models if is_usable(each.slug))
        if len(self._selections) >= MAX_SELECTIONS:
            self._selections.clear()
        until = time.monotonic() + SELECTION_SECONDS
        found = Selection(chosen, etag_of(chosen), self._billing.prices, until)
        self._selections[key.models, with_credential] = found
        if size_of(chosen) > MAX_BODY:
            reason = f"{size_of(chosen)} bytes; Codex may ignore more than {MAX_BODY}"
            self._log_once("model catalog too large", reason)
        return found

    def etag(self, key: Key, with_credential: bool) -> bytes | None:
        """Return the ETag of what a key gets, None if there is nothing yet. `with_credential` is as
        for `selection`."""
        found = self.selection(key, with_credential)
        return found.etag if found else None

    # A catalogue at a URL

    async def keep_fresh(self) -> None:
        """Fetch a catalogue at a URL now, at intervals, and after a reload."""
        while True:
            self._changed.clear()
            has_failed = is_web_address(self._place) and not await self._fetch(self._place)
            with contextlib.suppress(TimeoutError):
                seconds = FETCH_AGAIN_SECONDS if has_failed else REFRESH_SECONDS
                await asyncio.wait_for(self._changed.wait(), seconds)

    async def _fetch(self, url: str) -> bool:
        """Fetch the catalogue, and use it if it is valid. Return whether it is; log once if not."""
        try:
            body = await fetch_catalog(url, self._upstreams)
            models = None if body == self._fetched else parse_catalog(body)
        except CatalogError as error:
            if url == self._place:
                self._log_once(NOT_FETCHED, str(error))
            return False
        self._logged.discard(NOT_FETCHED)
        if models is not None and url == self._place:
            self._models, self._fetched = models, body
            self._selections.clear()
            log(logging.INFO, "model catalog fetched", models=len(models))
        return True

    def _log_once(self, event: str, reason: str) -> None:
        if event not in self._logged:
            self._logged.add(event)
            log(logging.WARNING, event, reason=reason)


async def fetch_catalog(url: str, upstreams: Upstreams) -> bytes:
    """Return what is at a URL, fetched with the key of the upstream to whose base_url it belongs,
    or else without a key. Raises CatalogError if the answer's status is not 200, or none comes."""
    try:
        status, body = await fetch_with_key(url, upstreams)
    except (httpx2.HTTPError, TimeoutError) as error:
        raise CatalogError([f"no answer ({cause_of(error)})"]) from None
    if status != 200:
        raise CatalogError([f"the answer has status {status}"])
    return body


async def fetch_with_key(url: str, upstreams: Upstreams) -> tuple[int, bytes]:
    if "client_version=" not in url:
        url += f"{'&' if '?' in url else '?'}client_version={MEASURED_VERSION}"
    for upstream in upstreams:
        base = upstream.settings.base_url.rstrip("/")
        if upstream.usable and url.startswith(f"{base}/"):
            return await upstream.fetch_whole(url.removeprefix(base))
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    stranger = Upstream(UpstreamSettings(name="codex-catalog", base_url=origin, api_key_env=""))
    try:
        return await stranger.fetch_whole(url.removeprefix(origin) or "/")
    finally:
        await stranger.close()
