"""Requests for stored responses."""

from __future__ import annotations

import contextlib
import re

from starlette.routing import Route

from redbtc.billing.spending import SpendingLimitReached
from redbtc.deadlines import Deadline
from redbtc.errors import StorageUnavailable
from redbtc.gateway.endpoints import Endpoint
from redbtc.gateway.forwarded_request import ForwardedRequest
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.plain_routes import ExactRoute
from redbtc.gateway.reading import read_body
from redbtc.gateway.references import location_of, not_own, required_location
from redbtc.gateway.relay import Relay
from redbtc.headers import Headers
from redbtc.limits.admission import Admission
from redbtc.limits.memory import Reservation
from redbtc.locations import ObjectLocation
from redbtc.meter.estimates import is_final
from redbtc.refusals import Refusal, insufficient_quota
from redbtc.request_body.body import RequestBody
from redbtc.request_body.media import media_of
from redbtc.request_body.query import Query
from redbtc.server.asgi import ClientRequest, Receive, Scope, Send, request_of
from redbtc.slices import in_slices
from redbtc.store.keys import Key
from redbtc.upstream.candidates import Candidates
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome

# How long an answer is read on after its reader has left, if its usage is only estimated.
USAGE_SECONDS = 15
OBJECT_ID = re.compile(r"[A-Za-z0-9][\w.:=+~-]{0,255}", re.ASCII)  # no path in it
LISTING = ("include", "include[]", "limit", "order", "after", "before")
STREAMING = ("include", "include[]", "stream", "starting_after", "include_obfuscation")
# By method and path after the id, the query fields that are forwarded.
QUERIES = {("GET", ""): STREAMING, ("GET", "/input_items"): LISTING}
SHOWING = (("GET", ""), ("POST", "/cancel"))  # these show the response
SERVED = (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"))


class StoredRequest(ForwardedRequest):
    """A request that reads or changes a stored response. It uses no tokens and has no row. If it
    shows that a background response has ended, the row of that response is settled first."""

    def __init__(
        self,
        gateway: Gateway,
        client_request: ClientRequest,
        endpoint: Endpoint,
        deadline: Deadline,
        admission: Admission,
        key: Key,
        response_id: str,
        location: ObjectLocation,
        deletes: bool,
    ) -> None:
        super().__init__(gateway, client_request, endpoint, deadline, admission, key)
        self._response_id = response_id
        self._location = location
        self._deletes = deletes

    def grace(self) -> float:
        """Return how many seconds the upstream is read on after the client has left. If the usage
        of the response is not known, that is long enough to find it: it follows the output, so a
        client could otherwise take the output and leave before the correction."""
        gateway, response_id = self.gateway, self._response_id
        unknown = self._location.tokens is None and response_id not in gateway.background
        unknown = unknown or gateway.corrections.shows_estimated(response_id)
        return max(super().grace(), USAGE_SECONDS if unknown else 0.0)

    @property
    def _is_requested(self) -> bool:
        """Return whether the upstream has answered with the requested response, as far as is
        known."""
        return self.meter.report.response_id in (None, self._response_id)

    def act_on_report(self) -> None:
        if self._is_requested:
            self.gateway.background.add_reader(self._response_id, self.meter.report)

    async def settle(self, outcome: Outcome) -> None:
        self.deadline.pause()
        self.settled = True
        gateway, status, report = self.gateway, self.status or 0, self.meter.report
        if self._is_requested:
            await gateway.background.finish_reader(self._response_id, report, status == 200)
        else:
            gateway.background.ignore_reader(self._response_id, report)
        if status == 200:
            await self._correct(outcome)
            self._own_listed()
        if self._deletes and status < 300:
            credential = self._location.credential
            await gateway.objects.disown(self._response_id, self.key.account_id, credential)
        gateway.telemetry.answered(
            self.client_request.id, self.client_request.route, status, outcome
        )

    async def _correct(self, outcome: Outcome) -> None:
        """Correct the estimate of the response, if there is one and its usage is known now. A
        request that is still in flight corrects its own."""
        gateway, response_id, report = self.gateway, self._response_id, self.meter.report
        if self._is_requested and self._location.tokens is None:
            for request in gateway.in_flight.with_row:
                request.note_shown(response_id)
        if self._is_torn(outcome):
            await self.ask_for_usage(response_id, self._location.upstream)
        elif report.response_id == response_id:
            await gateway.corrections.correct_if_final(
                response_id, self.key.account_id, report, self._location.credential
            )

    def _is_torn(self, outcome: Outcome) -> bool:
        """Return whether only an estimate of the response is known and this answer broke off
        before its usage: the client may have all of the output, and have stopped reading just
        before that."""
        if outcome not in ("client_disconnected", "upstream_failed"):
            return False
        estimated = self.gateway.corrections.shows_estimated(self._response_id)
        return estimated and not is_final(self.meter.report)

    def _own_listed(self) -> None:
        """Record listed input items as the account's if the upstream chose their ids. If the client
        may have chosen one, which could be another account's, only allow paging from the items."""
        listed, objects = self.meter.report.listed, self.gateway.objects
        account_id = self.key.account_id
        objects.note_listed(listed, self._response_id, account_id)
        if self._location.minted_input:
            minted = [each for each, made in listed.items() if made]
            objects.own(minted, account_id, self._location_of_listed())

    def _location_of_listed(self) -> ObjectLocation:
        """Return the location of an input item: it has at most the tokens of the response, which
        can have become known since this request began, or are not known yet."""
        objects, location = self.gateway.objects, self._location
        with contextlib.suppress(StorageUnavailable):
            account_id, credential = self.key.account_id, location.credential
            location = objects.location_of(self._response_id, account_id, credential) or location
        if growth := objects.growth_of(self._response_id):
            location = location.with_tokens((location.tokens or 0) + growth)
        return location._replace(minted_input=False)


def stored_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of stored responses."""
    return [
        ExactRoute(
            f"/v1/responses/{{id}}{suffix}",
            StoredRoute(gateway, method, suffix),
            methods=[method],
        )
        for method, suffix in SERVED
    ]


class StoredRoute:
    """The ASGI app for a stored response, which any key of its account reaches at its upstream.
    Others get the same answer as for a response that never existed."""

    def __init__(self, gateway: Gateway, method: str, suffix: str = "") -> None:
        self._gateway = gateway
        self._method = method
        self._suffix = suffix
        self._endpoint = Endpoint(f"/v1/responses/{{id}}{suffix}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, client_request = self._gateway, request_of(scope)
        client_request.route = self._endpoint.path
        key, settings = gateway.authenticate(client_request), gateway.settings
        response_id = scope["path_params"]["id"]
        deadline = Deadline(gateway.deadlines)
        charged = gateway.limiter.charge(key, settings.limits)
        with charged as admission, gateway.serving(client_request.client, deadline, key):
            location, candidates = choose_stored(gateway, client_request, key, response_id)
            query = self._query(client_request, key, response_id, scope["query_string"])
            with Reservation(gateway.limiter, key, settings) as reserved:
                client_request.received = reserved
                body = await read_body(
                    client_request.headers, receive, deadline, settings, reserved
                )
                if self._method != "POST":
                    body = b""  # it has no meaning in GET and DELETE (RFC 9110 §9.3.1, §9.3.5)
                elif body.strip():
                    check_plain_json(client_request.headers)
                    steps = RequestBody.read_body(body, body)
                    await required_location(
                        gateway, client_request, key, await in_slices(steps, key.account_id)
                    )
                if self._method == "DELETE" and response_id in gateway.background:
                    message = "The response is still in progress. Cancel it first."
                    raise Refusal("invalid_request", message)
                await gateway.limiter.take_places(admission, 0, deadline)
            await gateway.limiter.take_place_at_upstream(admission, candidates, deadline)
            client_request.received, reserved.body = None, b""
            with candidates, await self._hold(key, response_id, admission):
                request = StoredRequest(
                    gateway,
                    client_request,
                    self._endpoint,
                    deadline,
                    admission,
                    key,
                    response_id,
                    location,
                    deletes=self._method == "DELETE",
                )
                path = f"/responses/{response_id}{self._suffix}"
                relay = Relay(request, send, self._method, path, body, query)
                body = b""
                await relay.forward(candidates)

    async def _hold(
        self, key: Key, response_id: str, admission: Admission
    ) -> contextlib.AbstractContextManager[None]:
        """Hold what a correction can add to the cost of a response, while it is shown in the
        returned context. Raises Refusal."""
        if (self._method, self._suffix) not in SHOWING:
            return contextlib.nullcontext()
        try:
            return await self._gateway.corrections.hold(response_id, key.account_id)
        except SpendingLimitReached as error:
            unknown = (
                "The usage of this response is not known yet. "
                "It will be charged to the key that created the response."
            )
            refusal = insufficient_quota(f"{error} {unknown}")
        except StorageUnavailable:
            refusal = Refusal("ledger_unavailable")
        admission.undo(refusal)
        raise refusal

    def _query(
        self, client_request: ClientRequest, key: Key, response_id: str, given: bytes
    ) -> bytes:
        """Return the part of the query that is forwarded. `after` and `before` must name an item
        that the account owns, or that this response's listing showed it. Raises Refusal."""
        digest = client_request.digest
        query = Query(given, QUERIES.get((self._method, self._suffix), ()))
        for name in ("after", "before"):
            for object_id in query.values(name):
                objects, account_id = self._gateway.objects, key.account_id
                shown = objects.was_listed(object_id, response_id, account_id)
                if not shown and location_of(self._gateway, key, digest, object_id) is None:
                    raise not_own(name)
        return query.encoded()


def check_plain_json(headers: Headers) -> None:
    """Raise Refusal if the headers announce a body that is not JSON, or compressed."""
    if media_of(headers, forms=False).encoding:
        message = (
            "The body of this request must not be compressed; send it without Content-Encoding."
        )
        raise Refusal("unsupported_media_type", message)


def choose_stored(
    gateway: Gateway, client_request: ClientRequest, key: Key, response_id: str
) -> tuple[ObjectLocation, Candidates[Upstream]]:
    """Return where the account's response is stored, and the members that can be asked for it, with
    the credential that it was stored with. Raises Refusal."""
    location = None
    if OBJECT_ID.fullmatch(response_id):
        location = location_of(gateway, key, client_request.digest, response_id)
    if location is None:
        raise Refusal("response_not_found", f"Response with id '{response_id}' not found.")
    by_client = location.credential is not None
    return location, gateway.upstreams.holders(location.upstream, with_credential=by_client)
