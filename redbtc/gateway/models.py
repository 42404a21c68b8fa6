"""GET /v1/models and /v1/models/{id}, and Codex CLI's model catalogue."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import orjson

from redbtc.codex.catalog import body_of
from redbtc.deadlines import Deadline
from redbtc.gateway.gateway import Gateway
from redbtc.headers import Headers
from redbtc.limits.admission import Admission
from redbtc.meter.answers import MAX_NAME
from redbtc.meter.error_codes import CREDENTIAL_STATUSES
from redbtc.refusals import Refusal
from redbtc.server.asgi import ClientRequest, Receive, Scope, Send, ids_of, request_of, respond
from redbtc.slices import with_turns
from redbtc.store.keys import Key
from redbtc.upstream.upstreams import NO_LIST, Upstream

MODEL_NAME = re.compile(r"[A-Za-z0-9@~][\w.:@+~-]*(?:/[A-Za-z0-9@~][\w.:@+~-]*)*", re.ASCII)
NEW_SECONDS = 1  # a list that is younger has just been given
NO_CATALOG = (
    "This gateway has no model catalogue for Codex: codex.catalog is not set. Without "
    "model_catalog_url in its configuration, Codex uses its own."
)


class Models:
    """The models that a key may use, as the upstreams list them."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def list(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer with the lists of all upstreams, joined in their order, less what the key may not
        use and what has no price where that is refused. The header Age is that of the oldest of the
        lists, where an upstream gave no new one."""
        request = request_of(scope)
        request.route = "/v1/models"
        gateway = self._gateway
        key = gateway.authenticate(request)
        if asks_for_catalog(scope["query_string"]):
            await self._catalog(request, send, key)
            return
        deadline = Deadline(gateway.deadlines)
        charged = gateway.limiter.charge(key, gateway.settings.limits)
        with charged as admission, gateway.serving(request.client, deadline, key):
            await gateway.limiter.take_places(admission, 0, deadline)
            members = gateway.upstreams.shown_to(request.credential is not None)
            joined, age = await self._listed(key, members) if members else ({}, 0.0)
        body = orjson.dumps({"object": "list", "data": list(joined.values())})
        await self._answer(request, send, 200, body, age_header(age))

    async def _catalog(self, request: ClientRequest, send: Send, key: Key) -> None:
        """Answer with Codex CLI's model catalogue, or say that the client has it already. It counts
        in the rates, but takes no place and so does not wait: Codex gives up after 5 seconds, and
        then works without most of its tools."""
        gateway = self._gateway
        if not gateway.catalog.is_set:
            raise Refusal("unknown_url", NO_CATALOG)
        with gateway.limiter.charge(key, gateway.settings.limits):
            found = gateway.catalog.selection(key, request.credential is not None)
            if found is None:
                message = "The model catalogue has not been fetched yet."
                raise Refusal("upstream_unreachable", message)
        headers = [(b"etag", found.etag), (b"cache-control", b"private, no-cache")]
        known = b",".join([value for name, value in request.headers if name == b"if-none-match"])
        if known and names_etag(known, found.etag):
            self._gateway.telemetry.answered(request.id, request.route, 304)
            # Without Content-Length, which would be that of the catalogue (RFC 9110 §8.6).
            head = [*ids_of(request), *headers]
            await send({"type": "http.response.start", "status": 304, "headers": head})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self._answer(request, send, 200, body_of(found.models), headers)

    async def show(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer with one model, as the first upstream that serves it and answers describes it, or
        as it was listed last."""
        request = request_of(scope)
        request.route = "/v1/models/{id}"
        gateway = self._gateway
        key = gateway.authenticate(request)
        deadline = Deadline(gateway.deadlines)
        charged = gateway.limiter.charge(key, gateway.settings.limits)
        with charged as admission, gateway.serving(request.client, deadline, key):
            name = scope["path_params"]["model"]
            with_credential = request.credential is not None
            shown = self._shown(key, name, admission, deadline, with_credential)
            status, body, headers = await shown
        await self._answer(request, send, status, body, headers)

    async def _answer(
        self, request: ClientRequest, send: Send, status: int, body: bytes, headers: Headers
    ) -> None:
        self._gateway.telemetry.answered(request.id, request.route, status)
        await respond(request, send, status, body, headers)

    async def _listed(
        self, key: Key, upstreams: Iterable[Upstream]
    ) -> tuple[dict[str, dict[str, Any]], float]:
        """Return the models that the key may use, and the age of the oldest list in seconds. Raises
        Refusal where no upstream ever gave a list."""
        usable = [upstream for upstream in upstreams if upstream.usable]
        if not usable:
            raise Refusal("no_upstream", retry_after=5)
        tables: defaultdict[str, list[Upstream]] = defaultdict(list)
        for upstream in usable:
            tables[upstream.settings.name].append(upstream)
        asked = (list_of(members) for members in tables.values())
        lists = await asyncio.gather(*asked, return_exceptions=True)
        joined: dict[str, dict[str, Any]] = {}
        oldest, failures = 0.0, []
        for found, members in zip(lists, tables.values(), strict=True):
            if isinstance(found, BaseException):
                failures.append(found)
                continue
            oldest = max(oldest, found[1])
            async for model in with_turns(found[0]):
                is_free = members[0].is_client and self._gateway.upstreams.are_free(model["id"])
                if self._is_usable(key, model["id"], is_free):
                    joined.setdefault(model["id"], model)
        if len(failures) == len(lists):
            raise failures[0]
        return joined, oldest

    def _is_usable(self, key: Key, model: str, is_free: bool) -> bool:
        return (is_free or self._gateway.billing.may_serve(model)) and key.allows(model)

    async def _shown(
        self,
        key: Key,
        name: str,
        admission: Admission,
        deadline: Deadline,
        with_credential: bool,
    ) -> tuple[int, bytes, Headers]:
        """Return the status, body and headers of the answer about a model. Raises Refusal."""
        gateway = self._gateway
        # '../files' must not reach the upstream. To match a long name takes long.
        is_name = len(name) <= MAX_NAME and MODEL_NAME.fullmatch(name)
        is_free = with_credential and gateway.upstreams.are_free(name)
        if not (is_name and self._is_usable(key, name, is_free)):
            raise Refusal("model_not_found", param="model")
        upstreams = gateway.upstreams.candidates(name, with_credential=with_credential).members
        await gateway.limiter.take_places(admission, 0, deadline)
        for upstream in upstreams:
            if upstream.is_client:  # the gateway has no credential to ask it with
                continue
            with contextlib.suppress(*NO_LIST):
                status, shown = await upstream.fetch_whole(f"/models/{name}")
                if 200 <= status < 500 and status not in CREDENTIAL_STATUSES:
                    return status, shown, []
        listed, age = await self._listed(key, upstreams)
        if name not in listed:
            is_asked = not all(each.is_client for each in upstreams)
            raise Refusal("upstream_unreachable" if is_asked else "model_not_found")
        return 200, orjson.dumps(listed[name]), age_header(age)


async def list_of(members: Iterable[Upstream]) -> tuple[list[dict[str, Any]], float]:
    """Return the list of models of one upstream, and its age in seconds: the list of the first of
    its members that gives one now, or the newest that one of them gave before. Raises Refusal."""
    found: list[tuple[list[dict[str, Any]], float]] = []
    for upstream in members:
        with contextlib.suppress(Refusal):
            found.append(await upstream.models())
            if found[-1][1] < NEW_SECONDS:
                break
    if not found:
        raise Refusal("upstream_unreachable", "The upstream did not return a list of models.")
    return min(found, key=lambda each: each[1])


def asks_for_catalog(query: bytes) -> bool:
    """Return whether a query asks for Codex CLI's model catalogue: it has one `client_version`."""
    if b"client_version=" not in query:
        return False
    names = [field.partition(b"=")[0] for field in query.split(b"&")]
    return names.count(b"client_version") == 1


def names_etag(known: bytes, etag: bytes) -> bool:
    """Return whether If-None-Match names an ETag (RFC 9110 §13.1.2, by weak comparison)."""
    tags = [tag.strip().removeprefix(b"W/") for tag in known.split(b",")]
    return etag in tags or tags == [b"*"]


def age_header(seconds: float) -> Headers:
    """Return the Age header (RFC 9111 §5.1) of a list that is not new."""
    return [(b"age", b"%d" % seconds)] if seconds >= NEW_SECONDS else []
