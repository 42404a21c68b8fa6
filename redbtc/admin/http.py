"""The admin API over HTTP."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import orjson
from msgspec import UNSET, Struct
from msgspec.structs import astuple
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from redbtc.admin.actors import Actor, Forbidden, Invalid, TooLarge, Unauthorized
from redbtc.admin.api import API, OPERATIONS
from redbtc.admin.openapi import openapi
from redbtc.admin.operations import PREFIX, Operation, variables_of
from redbtc.admin.outputs import Error, Refused
from redbtc.admin.outputs_log import BodyContent
from redbtc.admin.passwords import Busy, Later, TooMany
from redbtc.errors import Conflict, NotFound, StorageUnavailable, UserError
from redbtc.slices import with_turns

USER_HEADER = b"redbtc-user"  # the header in which a command names its user
PART_BYTES = 64 << 10
MAX_BODY_BYTES = 4 << 20  # of an operator: thousands of prices
MAX_MEMBERS_BODY = 64 << 10  # bytes; of other actors: 4 MB of JSON take 100 ms to read
MAX_FIELDS = 100  # of a query or a form

STATUS: dict[type[UserError], int] = {
    Invalid: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    TooMany: 429,
    StorageUnavailable: 503,
    Busy: 503,
}
DEFAULT_STATUS = 409  # well formed, but not possible in the current state
Authenticate = Callable[[Request], Actor]
Abort = Callable[[Request], None]


def local_actor(request: Request) -> Actor:
    """Return the actor of a request on the Unix socket: an operator, since only a user who may open
    the database itself may open the socket."""
    return Actor(request.headers.get(USER_HEADER.decode(), "local"), "operator")


SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def json_parts(found: Struct | Mapping[str, Any]) -> Iterator[bytes]:
    """Yield an answer as JSON, a value at a time."""
    yield b"{"
    for number, (name, value) in enumerate(members_of(found)):
        yield (b"," if number else b"") + msgspec.json.encode(name) + b":"
        if not isinstance(value, list):
            yield msgspec.json.encode(value)
            continue
        yield b"["
        for place, each in enumerate(value):
            yield (b"," if place else b"") + msgspec.json.encode(each)
        yield b"]"
    yield b"}"


def members_of(found: Struct | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the members of an answer, by the names that JSON has for them."""
    if not isinstance(found, Struct):
        return list(found.items())
    pairs = zip(found.__struct_encode_fields__, astuple(found), strict=True)
    return [(name, value) for name, value in pairs if value is not UNSET]


async def response_in_parts(
    bits: Iterable[bytes], status: int, headers: Mapping[str, str], media_type: str
) -> Response:
    """Return a response whose content may be long."""
    parts: list[bytes] = []
    part = bytearray()
    async for bit in with_turns(bits):
        part += bit
        if len(part) >= PART_BYTES:
            parts.append(bytes(part))
            part.clear()
    parts.append(bytes(part))
    if len(parts) == 1:
        return Response(parts[0], status, headers, media_type)
    length = {"content-length": str(sum(map(len, parts)))}
    return StreamingResponse(with_turns(parts), status, {**headers, **length}, media_type)


async def stream_response(parts: AsyncIterator[bytes], media_type: str) -> Response:
    """Return a response that is sent as it is made. The status is sent with the first part, so a
    failure before that still gets an error response."""
    first = await anext(parts)

    async def all_parts() -> AsyncIterator[bytes]:
        yield first
        async for part in parts:
            yield part

    return StreamingResponse(all_parts(), headers=SECURITY_HEADERS, media_type=media_type)


async def bytes_response(content: bytes, headers: Mapping[str, str]) -> Response:
    """Return bytes as a response that no browser shows or runs, whatever they are."""
    parts = (content[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES))
    return await response_in_parts(parts, 200, headers, "application/octet-stream")


async def json_response(found: Struct | Mapping[str, Any], status: int = 200) -> Response:
    """Return an answer as a response of JSON."""
    return await response_in_parts(json_parts(found), status, SECURITY_HEADERS, "application/json")


async def error_response(status: int, message: str, headers: Mapping[str, str]) -> Response:
    """Return an error response in the form of OpenAI's API."""
    response = await json_response(Refused(Error(message, "invalid_request_error")), status)
    response.headers.update(headers)
    return response


async def user_error_response(_: Request, error: Exception) -> Response:
    """Return the error response for a UserError."""
    status = STATUS.get(type(error), DEFAULT_STATUS)  # type: ignore[arg-type]
    return await error_response(status, str(error), retry_after(error))


def retry_after(error: Exception) -> dict[str, str]:
    """Return the headers of an error response; they say when to try again, if that can help."""
    seconds = error.seconds if isinstance(error, Later) else 5
    again = isinstance(error, (Later, StorageUnavailable))
    return {"retry-after": str(seconds)} if again else {}


ERROR_MESSAGES = {404: "Unknown request URL.", 500: "The gateway could not process this request."}


async def other_error_response(_: Request, error: Exception) -> Response:
    """Return the error response for an unknown path or method, or for an unexpected error."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = ERROR_MESSAGES.get(status, "Method not allowed.")
    headers = error.headers if isinstance(error, HTTPException) else None
    return await error_response(status, message, headers or {})


def leave_open(_: Request) -> None:
    """Do nothing, since a command stays authenticated."""


def admin_app(api: API, authenticate: Authenticate, abort: Abort = leave_open) -> Starlette:
    """Return the operations as an app. `authenticate` returns the actor of a request; `abort` ends
    the connection of one whose session has ended, in the middle of its answer."""
    by_path: dict[str, dict[str, Operation]] = {}
    for each in OPERATIONS:
        for path in each.paths:
            by_path.setdefault(PREFIX + path, {})[each.method] = each
    routes = [Route(f"{PREFIX}/openapi.json", _describe, methods=["GET"])]
    for path, operations in by_path.items():
        endpoint = _endpoint(api, path, operations, authenticate, abort)
        path = path.replace("{upstream}", "{upstream:path}")  # names of members have a slash
        routes.append(Route(path, endpoint, methods=list(operations)))
    handlers: dict[Any, Any] = {
        UserError: user_error_response,
        HTTPException: other_error_response,
        Exception: other_error_response,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _describe(request: Request) -> Response:
    body = _description(secure=request.url.scheme == "https")
    return Response(body, headers=SECURITY_HEADERS, media_type="application/json")


@functools.cache
def _description(*, secure: bool) -> bytes:
    """Return `openapi` as JSON. It is made once, since that takes about 10 ms."""
    return orjson.dumps(openapi(secure=secure))


def check_fields(encoded: bytes) -> None:
    """Raise Invalid if a query or a form has more than MAX_FIELDS fields: 30,000 take 25 ms."""
    if encoded.count(b"&") >= MAX_FIELDS:
        raise Invalid(f"too many fields in the query or form; at most {MAX_FIELDS} are allowed")


async def whole_body(request: Request, maximum: int) -> bytes:
    """Return the body of a request. Raises TooLarge as soon as it has more than `maximum` bytes,
    and Invalid if it ends too early."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > maximum:
                raise TooLarge(f"the request body is larger than {maximum} bytes")
    except ClientDisconnect:
        raise Invalid("the request body is incomplete") from None
    return bytes(body)


async def while_authenticated(
    request: Request, parts: AsyncIterator[bytes], authenticate: Authenticate, abort: Abort
) -> AsyncIterator[bytes]:
    """Yield the parts of an answer for as long as its actor is authenticated. Otherwise the answer
    is torn: a normal end would make it look complete."""
    async for part in parts:
        yield part
        try:
            authenticate(request)
        except UserError:
            abort(request)
            return


def _endpoint(
    api: API,
    path: str,
    operations: dict[str, Operation],
    authenticate: Authenticate,
    abort: Abort,
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        operation = operations["GET" if request.method == "HEAD" else request.method]
        actor = authenticate(request)
        check_fields(request.scope["query_string"])
        pairs = request.query_params.multi_items()
        query = dict(pairs)
        if len(query) < len(pairs):
            raise Invalid("duplicate query parameter")
        has_body = operation.method in ("POST", "PATCH")
        maximum = MAX_BODY_BYTES if actor.rank == "operator" else MAX_MEMBERS_BODY
        body = await whole_body(request, maximum) if has_body else b""
        actor = authenticate(request)  # again: the session may have ended meanwhile
        values = {name: request.path_params[name] for name in variables_of(path)}
        found = await api.perform_request(operation, actor, values, query, body)
        if isinstance(found, AsyncIterator):
            parts = while_authenticated(request, found, authenticate, abort)
            return await stream_response(parts, operation.media_type)
        if isinstance(found, BodyContent):
            return await bytes_response(found.content, SECURITY_HEADERS)
        return await json_response(found, operation.status)

    return endpoint
