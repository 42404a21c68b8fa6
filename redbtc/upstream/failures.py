"""Why an upstream could not be asked, or did not answer: one of a fixed set of causes.

| cause | the request failed because |
|---|---|
| `dns` | the host's name was not resolved, or not in time |
| `refused` | the host refused the connection |
| `connect_timeout` | there was no connection within connect_timeout_seconds |
| `unreachable` | the network, or this machine, let no connection through |
| `tls: ` and OpenSSL's words for it | TLS failed, such as `tls: certificate has expired` |
| `reset` | the connection ended before the head of the response, or was reset |
| `not_http` | bytes came that are no HTTP response |
| `first_byte_timeout` | the head of the response took too long |
| `idle_timeout` | a part of the request or of the response's body took too long |
| `protocol` | the response broke HTTP's rules in another way, such as a body cut short |

A cause contains no text of the upstream and no name of a host.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import httpx2
from websockets.exceptions import ConnectionClosed, InvalidHandshake

# What a request fails with where no connection came about. A proxy's refusal comes before the
# request is sent.
NO_CONNECTION = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)
NOT_HTTP = ("illegal status line", "illegal request line")  # what httpx2's own transport says then
PING_NOT_ANSWERED = 1011  # the code with which websockets then closes a connection


class ConnectTimedOut(TimeoutError):
    """There was no connection within the upstream's connect timeout."""


class NoResponse(httpx2.RemoteProtocolError):
    """The connection ended before the head of a response had arrived."""


class NotHTTP(httpx2.RemoteProtocolError):
    """The first bytes of the response are not those of HTTP."""


def failed_to_connect(error: BaseException) -> bool:
    """Return whether nothing of a request can have reached the upstream, by the error that
    Upstream.open or Upstream.connect has raised: another upstream may be tried. It is False for an
    upstream that has answered the handshake of a WebSocket with an error, and for TimeoutError
    itself, which is that of a deadline."""
    if isinstance(error, OSError):  # of Upstream.connect: Upstream.open raises errors of httpx2
        return type(error) is not TimeoutError
    return isinstance(error, NO_CONNECTION)


def cause_of(error: BaseException, head_came: bool = False) -> str:
    """Return the cause of a failure, by the error that it was noticed with: one that Upstream.open,
    Upstream.connect or the body of a response has raised, or TimeoutError for a deadline. After the
    head of a response, `head_came` is true."""
    if isinstance(error, (httpx2.ConnectTimeout, ConnectTimedOut)):
        return "connect_timeout"
    if isinstance(error, (*NO_CONNECTION, OSError)) and type(error) is not TimeoutError:
        return _connection_cause(list(_causes(error)))
    if isinstance(error, (httpx2.TimeoutException, TimeoutError)):
        late = head_came or isinstance(error, httpx2.WriteTimeout)
        return "idle_timeout" if late else "first_byte_timeout"
    if isinstance(error, httpx2.NetworkError):
        return "reset"
    if isinstance(error, ConnectionClosed):
        return _closing_cause(error)
    if isinstance(error, InvalidHandshake):
        return _handshake_cause(error)
    return _protocol_cause(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from. httpx2 has the latter as an argument."""
    yield error
    group = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for each in (*group, *error.args, error.__cause__):
        if isinstance(each, BaseException):
            yield from _causes(each)


def _connection_cause(errors: list[BaseException]) -> str:
    """Return why no connection came about. Of several addresses, what the host itself has answered
    says more than what kept others from being reached."""
    for each in errors:
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"tls: {each.verify_message.partition(',')[0]}"  # the rest names the host
        if isinstance(each, ssl.SSLError):
            reason = getattr(each, "reason", None) or "no handshake"
            return f"tls: {reason.replace('_', ' ').lower()}"
    for kind, cause in (
        (socket.gaierror, "dns"),
        (ConnectionRefusedError, "refused"),
        (TimeoutError, "connect_timeout"),
        (ConnectionError, "reset"),
    ):
        if any(isinstance(each, kind) for each in errors):
            return cause
    kept_out = any(isinstance(each, (OSError, httpx2.ProxyError)) for each in errors)
    return "unreachable" if kept_out else "reset"  # httpx2 has no OSError for an early end


def _closing_cause(closed: ConnectionClosed) -> str:
    """Return why a WebSocket ended: it was closed by the upstream, or by us for its silence or for
    what it sent."""
    if closed.sent is None or closed.rcvd_then_sent:
        return "reset"
    return "idle_timeout" if closed.sent.code == PING_NOT_ANSWERED else "protocol"


def _handshake_cause(error: InvalidHandshake) -> str:
    """Return why a WebSocket was not opened though its upstream could be reached."""
    causes = list(_causes(error))
    if any(isinstance(each, (EOFError, ConnectionError)) for each in causes):
        return "reset"
    return "not_http" if any(isinstance(each, ValueError) for each in causes) else "protocol"


def _protocol_cause(error: BaseException) -> str:
    """Return how an answer broke the rules. httpx2's own transport tells it by messages alone."""
    if isinstance(error, NoResponse) or str(error).startswith("Server disconnected"):
        return "reset"
    if isinstance(error, NotHTTP) or str(error).startswith(NOT_HTTP):
        return "not_http"
    return "protocol"
