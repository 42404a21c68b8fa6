"""The objects that a request refers to, and the upstreams that may take it.

All accounts share the upstream's key, so a request may only name objects that its own account has
made, with the operator's credential or with the client's own that it brings. Any other object gets
the same answer as one that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping

from redbtc.errors import StorageUnavailable
from redbtc.gateway.gateway import Gateway
from redbtc.headers import Headers, header
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import MAX_NAME
from redbtc.rates import DEFAULT_TIER, NEEDED
from redbtc.refusals import Refusal, not_found
from redbtc.request_body.body import RequestBody
from redbtc.server.asgi import ClientRequest
from redbtc.slices import in_slices
from redbtc.steps import Steps
from redbtc.store.keys import Key
from redbtc.store.objects import MAX_LOOK_UPS
from redbtc.upstream.candidates import Candidates, session_hash
from redbtc.upstream.configured import needs_credential
from redbtc.upstream.upstreams import Upstream

# References to these get the answer that OpenAI gives for a response that does not exist.
NOT_FOUND = ("previous_response_id", "comparison_response_id")
SESSION_HEADERS = (b"session-id", b"thread-id", b"session_id")
NOTHING: Mapping[str, ObjectLocation] = {}


def location_of(
    gateway: Gateway, key: Key, digest: str | None, object_id: str
) -> ObjectLocation | None:
    """Return where an object of the key's account is stored, None for any other object. `digest` is
    that of the client's own credential. Raises Refusal."""
    try:
        return gateway.objects.location_of(object_id, key.account_id, digest)
    except StorageUnavailable:
        raise Refusal("ledger_unavailable") from None


def affinity_of(
    key: Key, headers: Headers, body: RequestBody | None = None, connection_id: str = ""
) -> bytes | None:
    """Return what stands for the session of a request: the first name that its body or its headers
    give one, else `connection_id`, that of its WebSocket. None if there is none."""
    name = body.cache_key if body else ""
    if not name:
        for header_name in SESSION_HEADERS:
            if value := header(headers, header_name):
                name = value.decode("latin-1")
                break
        else:
            name = connection_id
    return session_hash(key.account_id, name) if name else None


async def candidates_for(
    gateway: Gateway,
    key: Key,
    client_request: ClientRequest,
    body: RequestBody,
    made: Mapping[str, ObjectLocation] = NOTHING,
    *,
    connection_id: str = "",
    needs_price: bool = True,
) -> Candidates[Upstream]:
    """Return the members that may take a request, the first to try in front. `connection_id` is the
    id of its WebSocket, "" if it comes over HTTP. `made` is as for `required_location`.
    `needs_price`: its model must have a price where others are refused. Raises Refusal."""
    required = await required_location(gateway, client_request, key, body, made)
    model, upstreams, is_free = body.model, gateway.upstreams, False
    with_credential = client_request.credential is not None
    if with_credential and not (required and required.credential is None):
        is_free = upstreams.are_free(model)
    for each in (model, *filter(None, body.further_models())):
        if not key.allows(each):
            message = f"This API key is not allowed to use the model '{each}'."
            raise Refusal("model_not_allowed", message, param="model")
        if needs_price and not (is_free or gateway.billing.may_serve(each)):
            if not with_credential and upstreams.are_free(each):
                raise needs_credential(each)
            gateway.billing.unpriced.note(each, key.account_id)
            message = f"The model '{each}' does not exist or is not available here."
            raise Refusal("model_not_found", message, param="model")
    if body.extras and not is_free:
        check_rates(gateway, body)
    websocket = bool(connection_id)
    if required is not None:
        by_client = required.credential is not None
        return upstreams.holders(
            required.upstream, model, websocket=websocket, with_credential=by_client
        )
    session = None
    if upstreams.are_several:
        session = affinity_of(key, client_request.headers, body, connection_id)
    return upstreams.candidates(
        model,
        session,
        replays=body.replays,
        websocket=websocket,
        with_credential=with_credential,
    )


def check_rates(gateway: Gateway, body: RequestBody) -> None:
    """Raise Refusal for a request that could use what the price of its model has no rate for."""
    model, tier = body.facts.model or "", body.facts.service_tier
    for rate, member in body.needed_rates():
        if lacking := gateway.billing.lacks(model, rate, tier):
            of_tier = "" if lacking.tier == DEFAULT_TIER else f" for the tier '{lacking.tier}'"
            message = (
                f"This request {NEEDED[rate]}, but the price of the model '{model}'{of_tier} has "
                f"no rate '{rate}'. Ask your administrator to add it."
            )
            raise Refusal("invalid_request", message, param=member)


async def required_location(
    gateway: Gateway,
    client_request: ClientRequest,
    key: Key,
    body: RequestBody,
    made: Mapping[str, ObjectLocation] = NOTHING,
) -> ObjectLocation | None:
    """Return where what the request builds on is stored, None if it builds on nothing. The body
    inherits the models and tools that work in that, and its tokens, and drops its references, so
    that they take no memory while the request waits for a place. `made` is what the client can name
    without its being stored. Raises Refusal."""
    if not body.references:
        return None
    steps = resolve(gateway, key, client_request.digest, body, made)
    required = await in_slices(steps, key.account_id, started=True)
    body.references = {}
    return required


def resolve(
    gateway: Gateway,
    key: Key,
    digest: str | None,
    body: RequestBody,
    made: Mapping[str, ObjectLocation],
) -> Steps[ObjectLocation | None]:
    """Find all that a body refers to, in small steps. Return where it is stored. `digest` is as for
    `location_of`. Raises Refusal."""
    # "" is nobody's. Long ids were never learned, and many of them would make a long query.
    asked = list({each.id for each in body.references if 0 < len(each.id) <= MAX_NAME})
    found: dict[str, ObjectLocation | None] = {}
    for at in range(0, len(asked), MAX_LOOK_UPS):
        found |= look_up(gateway, key, digest, asked[at : at + MAX_LOOK_UPS])
        yield
    # By upstream, and by the credential that they were stored with.
    places: dict[tuple[str, str | None], ObjectLocation] = {}
    for number, (each, mentions) in enumerate(body.references.items()):
        location = found[each.id] if each.id in found else made.get(each.id)
        if location is None and each.name in NOT_FOUND and len(each.id) <= MAX_NAME:
            raise not_found(each.name, each.id)
        if location is None:
            raise not_own(each.name)
        places[location.upstream, location.credential] = location
        body.inherit(each, mentions, location, gateway.objects.growth_of(each.id))
        if number % 1000 == 0:
            yield
    if len({(gateway.upstreams.named(name), stored_with) for name, stored_with in places}) > 1:
        message = "The referenced objects are stored at different upstreams."
        raise Refusal("invalid_request", message)
    return next(iter(places.values()), None)


def look_up(
    gateway: Gateway, key: Key, digest: str | None, ids: list[str]
) -> dict[str, ObjectLocation | None]:
    """Return where these objects are stored, None for those that the request can't name. `digest`
    is as for `location_of`. Raises Refusal."""
    try:
        return gateway.objects.look_up(ids, key.account_id, digest)
    except StorageUnavailable:
        raise Refusal("ledger_unavailable") from None


def not_own(name: str) -> Refusal:
    """Return the refusal of a reference to an object that is not the account's. It is the same for
    another account's object as for one that does not exist."""
    message = f"'{name}' refers to an object that does not exist or belongs to another account."
    return Refusal("invalid_request", message, param=name)
