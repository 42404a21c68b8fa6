"""Send a request to an upstream, and its answer to the client."""

from __future__ import annotations

import asyncio

import httpx2

from redbtc.gateway.answer import AnswerBody
from redbtc.gateway.client_response import ClientResponse, Sent
from redbtc.gateway.forwarded_request import ForwardedRequest
from redbtc.request_body.pieces import Buffer
from redbtc.server.asgi import Send
from redbtc.slices import answer_queue, in_slices
from redbtc.upstream.headers import headers_for_upstream
from redbtc.upstream.upstreams import UploadBody, Upstream

UPSTREAM_CLOSE_SECONDS = 0.1  # until the upstream notices a closed connection: a place is taken


class Relay:
    """One HTTP request on its way to the upstream, and the answer on its way back."""

    def __init__(
        self,
        request: ForwardedRequest,
        send: Send,
        method: str,
        path: str,
        body: Buffer,
        query: bytes = b"",
    ) -> None:
        """`query` is what is forwarded of the client's query."""
        self._request = request
        self._deadline = request.deadline
        self._method = method
        self._path = path
        self._query = query
        self._bytes = body
        self._upload = UploadBody(body)
        self._response = ClientResponse(send)
        self._answer: AnswerBody | None = None  # once its head has arrived

    async def forward(self, upstreams: list[Upstream]) -> None:
        """Send the request to the first upstream that can be reached, pass its answer on, settle
        the request and end the response. Raises Refusal where the client has got nothing yet,
        ClientLeft."""
        grace = self._request.grace()
        failure = ""
        for upstream in upstreams:
            self._request.note_upstream(upstream)
            upstream.in_flight += 1
            try:
                with self._deadline.running(upstream.settings.total_timeout_seconds, grace):
                    await self._ask(upstream)
                failure = ""
                break
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                failure = "upstream_unreachable"  # it can't have acted on it: try the next
            except (TimeoutError, httpx2.TimeoutException):
                failure = "upstream_timeout"
                break
            except (httpx2.RemoteProtocolError, httpx2.LocalProtocolError):
                failure = "upstream_protocol_error"
                break
            except httpx2.HTTPError:
                failure = "upstream_unreachable"
                break
            finally:
                upstream.in_flight -= 1
        rest = self._answer.rest if self._answer else None
        if rest is None:
            await self._fail(failure)
        else:
            if failure:
                await asyncio.sleep(UPSTREAM_CLOSE_SECONDS)
            await self._end(rest)

    async def _ask(self, upstream: Upstream) -> None:
        """Send the request to one upstream, and pass its answer on."""
        self._deadline.allow(upstream.settings.first_byte_timeout_seconds)
        request = self._request
        secret, by = request.gateway.store.secret, request.repeatable_by
        headers = headers_for_upstream(request.client_request.headers, secret, by)
        if self._bytes or self._method == "POST":
            headers.append((b"content-length", b"%d" % len(self._bytes)))
        else:
            headers = [line for line in headers if line[0] != b"content-encoding"]
        self._upload = UploadBody(self._bytes)
        upstream_response = await upstream.open(
            self._method, self._path, self._query, headers, self._upload
        )
        idle_seconds = upstream.settings.idle_timeout_seconds
        self._answer = AnswerBody(request, self._response, idle_seconds)
        try:
            if not 200 <= upstream_response.status <= 599:
                raise httpx2.RemoteProtocolError("not a final status")
            self._response.set_head(
                upstream_response, request.client_request.id, request.admission.headers()
            )
            request.note_status(upstream_response.status)
            await self._answer.relay(upstream_response.body)
        finally:
            await upstream_response.body.aclose()

    async def _end(self, rest: bytes) -> None:
        """Complete the client's response. The upstream is done or closed, so give the places back
        first: a slow client then keeps nothing but its connection."""
        self._request.admission.give_back_places()
        await self._response.end(rest)

    async def _fail(self, failure: str) -> None:
        """Record how the request failed.

        | the client                | the upstream has begun to get the body | recorded            |
        |---------------------------|----------------------------------------|---------------------|
        | has left                  | no                                     | nothing             |
        | has left, or doesn't read | yes                                    | client_disconnected |
        | has been sent the head    | yes                                    | upstream_failed     |
        | has been sent nothing     | yes                                    | upstream_failed     |

        In the third case the client's connection ends without the answer's end, in the last one the
        client is told of the failure by a Refusal."""
        request, response, deadline = self._request, self._response, self._deadline
        if request.meter.at_once:
            request.meter.cut_off()
        else:
            account = answer_queue(request.key.account_id)
            await in_slices(request.meter.cut_off_steps(), account, started=True)
        if self._upload.begun:
            await asyncio.sleep(UPSTREAM_CLOSE_SECONDS)
        elif deadline.client_left:
            await request.forget()
        if deadline.client_left or response.waits_for_client:
            await request.settle("client_disconnected")
        elif response.sent is Sent.HEAD:
            await request.settle("upstream_failed")
        else:
            await request.fail(failure)
