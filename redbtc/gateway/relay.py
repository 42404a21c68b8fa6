"""Send a request to an upstream, and its answer to the client."""

from __future__ import annotations

import asyncio

import httpx2

from redbtc.gateway.answer import AnswerBody
from redbtc.gateway.client_response import ClientResponse
from redbtc.gateway.endpoints import RESPONSES
from redbtc.gateway.failover import (
    FAILURES,
    ErrorAnswer,
    Failover,
    is_failure,
    judge_end,
    must_be_read,
    read_error,
)
from redbtc.gateway.forwarded_request import REJECTED_KEY, ForwardedRequest
from redbtc.gateway.model_catalog import MODELS_ETAG
from redbtc.meter.error_codes import REJECTED_STATUSES
from redbtc.request_body.pieces import Buffer
from redbtc.server.asgi import Send
from redbtc.slices import answer_queue, in_slices
from redbtc.upstream.candidates import Candidates
from redbtc.upstream.failures import cause_of, failed_to_connect
from redbtc.upstream.headers import headers_for_upstream, readable_id, request_id_in
from redbtc.upstream.response import UpstreamResponse
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
        self._upload = UploadBody(body)  # emptied as soon as no attempt can follow
        self._response = ClientResponse(send)
        self._answer: AnswerBody | None = None  # once the head of the answer to pass on is there
        self._idle_seconds = 0.0  # of the member that is asked
        self._own_body: bytes | None = None  # what the client gets in place of the answer's
        self._failure = ""  # the error code for the client, if all members have failed
        self._failover: Failover[ErrorAnswer] | None = None

    async def forward(self, candidates: Candidates[Upstream]) -> None:
        """Send the request to the member at which it has a place, or to the next one after a
        failure of that one; pass the answer on, settle the request and end the response. The place
        is given back. Raises Refusal where the client has got nothing yet, ClientLeft."""
        member = candidates.member
        assert member is not None, "take_now has returned True"
        total = member.settings.total_timeout_seconds
        failure = ""
        try:
            try:
                with self._deadline.running(total, self._request.grace()):
                    response = await self._ask(candidates)
                    if response is None or (
                        response.status >= 400 and is_failure(response.status, candidates)
                    ):
                        response = await self._fail_over(candidates, response)
                        failure = self._failure
                    if response:
                        await self._pass(response, candidates)
            except (httpx2.HTTPError, TimeoutError) as error:
                failure = self._note_failure(error, candidates)
            rest = self._answer.rest if self._answer else None
            if rest is None:
                self._upload.body = b""
                await self._fail(failure)
            elif failure:
                await asyncio.sleep(UPSTREAM_CLOSE_SECONDS)
        finally:
            self._upload.body = b""
            candidates.give_back()
        if rest is not None:
            await self._end(rest)

    async def _ask(self, candidates: Candidates[Upstream]) -> UpstreamResponse | None:
        """Send the request to the member at which it has a place; return the head of its answer, or
        None if it could not be reached. Raises httpx2.HTTPError."""
        member, request = candidates.member, self._request
        assert member is not None, "go_on has returned True"
        if member.health.struggling and (cause := member.health.known_failure):
            request.note_failure(cause)
            return None
        request.note_attempt(member)
        member.health.past.attempts += 1
        headers = headers_for_upstream(
            request.client_request.headers, request.gateway.store.secret, request.idempotency_scope
        )
        if member.is_client:
            headers += request.client_request.credential_headers
        if self._upload.body or self._method == "POST":
            headers.append((b"content-length", b"%d" % len(self._upload.body)))
        else:
            headers = [line for line in headers if line[0] != b"content-encoding"]
        self._upload.begun = False
        self._idle_seconds = member.settings.idle_timeout_seconds
        self._deadline.allow(member.settings.first_byte_timeout_seconds)
        try:
            response = await member.open(
                self._method, self._path, self._query, headers, self._upload
            )
        except httpx2.HTTPError as error:
            if not failed_to_connect(error):
                raise
            self._note_failure(error, candidates)
            return None
        if not 200 <= response.status <= 599:
            await response.body.aclose()
            raise httpx2.RemoteProtocolError("not a final status")
        return response

    async def _fail_over(
        self, candidates: Candidates[Upstream], response: UpstreamResponse | None
    ) -> UpstreamResponse | None:
        """Send the request to other members after one has failed, with the answer `response` if it
        has given one. Return the answer to pass on: the first that is no failure, else the best of
        the others; None if there is none, or none that is the client's business. Raises
        httpx2.HTTPError."""
        request = self._request
        certain_only = candidates.is_pinned or request.creates_background
        queue_seconds = request.settings.limits.queue_seconds
        failover: Failover[ErrorAnswer] = Failover(
            request.settings.failover, request.left_at, certain_only=certain_only
        )
        self._failover = failover
        while response is None or must_be_read(response.status, candidates):
            answer = await self._read_error(candidates, response) if response else None
            if answer and answer.upstream_status not in FAILURES:
                best = (failover.best(None) if answer.is_unreadable else None) or answer
                return await self._best_of(best, answer, candidates)
            status = answer.upstream_status if answer else None
            self._deadline.allow(queue_seconds + 1)  # a place is waited for no longer than that
            # An answer that goes on needs the place that the request has.
            wait_seconds = 0 if answer and not answer.body.whole else queue_seconds
            goes_on = not self._deadline.client_left and await failover.go_on_in_turn(
                candidates, status, wait_seconds
            )
            if not goes_on or self._deadline.client_left:
                return await self._best_of(failover.best(answer), answer, candidates)
            if answer:
                await answer.body.aclose()
                if answer.body.whole:
                    failover.keep(answer)
            response = await self._ask(candidates)
        return response

    async def _best_of(
        self,
        best: ErrorAnswer | None,
        last: ErrorAnswer | None,
        candidates: Candidates[Upstream],
    ) -> UpstreamResponse | None:
        """Return the best error answer as it is passed on. If it rejects the operator's key, which
        is not the client's business, or if there is none, return None, and note the error code for
        the client instead. The last one is closed if it is not the best."""
        if last and last is not best:
            await last.body.aclose()
        if best is None:
            self._failure = "upstream_unreachable"
            return None
        self._request.note_member(best.member)
        if best.upstream_status not in REJECTED_STATUSES:
            response, self._own_body = best.for_client(candidates.seconds_of_limit())
            return response
        await best.body.aclose()
        self._request.note_answer(best.upstream_status, request_id_in(best.response.headers))
        self._request.note_failure(best.code)
        self._failure = REJECTED_KEY
        return None

    async def _pass(self, response: UpstreamResponse, candidates: Candidates[Upstream]) -> None:
        """Pass an answer on. Raises httpx2.HTTPError."""
        request, status = self._request, response.status
        self._upload.body = b""  # it would stay in memory for as long as the answer takes
        is_good = status < 400 or not is_failure(status, candidates)
        if is_good:
            candidates.answer(serves=status < 400)
        own_body = self._own_body
        self._answer = AnswerBody(request, self._response, self._idle_seconds, own_body)
        try:
            begin(self._response, request, response, own_body)
            await self._answer.relay(response.body)
        finally:
            await response.body.aclose()
        if is_good:
            judge_end(candidates, request)

    async def _read_error(
        self, candidates: Candidates[Upstream], response: UpstreamResponse
    ) -> ErrorAnswer:
        """Read the beginning of an error answer, and note what it says of the member."""
        assert candidates.member is not None
        self._deadline.allow(self._idle_seconds)
        try:
            answer = await read_error(candidates.member, response)
            answer.judge(candidates)
            return answer
        except BaseException:
            await response.body.aclose()
            raise

    def _note_failure(self, error: Exception, candidates: Candidates[Upstream]) -> str:
        """Note why a member has failed. Return the error code for the client."""
        deadline, head_came = self._deadline, self._answer is not None
        cause = cause_of(error, head_came)
        self._request.note_failure(cause)
        # It is not the member's fault if its client is gone or does not read, if the whole has
        # taken too long, or if the request can't be sent as it is. An error answer that breaks off
        # is one failure, which has been noted already.
        clients = deadline.client_left or self._response.waits_for_client or deadline.total_is_over
        noted = head_came and self._request.upstream_status in FAILURES
        if not (clients or noted or isinstance(error, httpx2.LocalProtocolError)):
            candidates.fail(cause, torn=head_came)
        if failed_to_connect(error):
            return "upstream_unreachable"
        if isinstance(error, (TimeoutError, httpx2.TimeoutException)):
            return "upstream_timeout"
        protocol = isinstance(error, (httpx2.RemoteProtocolError, httpx2.LocalProtocolError))
        return "upstream_protocol_error" if protocol else "upstream_unreachable"

    async def _end(self, rest: bytes) -> None:
        """Complete the client's response. The upstream is done or closed, so give the places back
        first: a slow client then keeps nothing but its connection."""
        self._request.admission.give_back_places()
        await self._response.end(rest)

    async def _fail(self, failure: str) -> None:
        """Record how the request failed.

        | the client                | the upstream has begun to get the body | recorded            |
        |---------------------------|----------------------------------------|---------------------|
        | has left                  | no, nor has another one                | nothing             |
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
        if failure != REJECTED_KEY:  # else the answer has been read
            if self._upload.begun:
                await asyncio.sleep(UPSTREAM_CLOSE_SECONDS)
            elif deadline.client_left:
                await self._leave_unsent()
        if deadline.client_left or response.waits_for_client:
            await request.settle("client_disconnected")
        elif response.sent == "head":
            await request.settle("upstream_failed")
        else:
            await request.fail(failure)

    async def _leave_unsent(self) -> None:
        """Note the answer of an earlier member, if the client left while the request was on its way
        to another one: that is no use of a model. Raises ClientLeft if there is none."""
        request = self._request
        earlier = self._failover.best() if self._failover else None
        if earlier is None:
            await request.forget()
        else:
            request.note_member(earlier.member)
            request.note_answer(earlier.upstream_status, request_id_in(earlier.response.headers))


def begin(
    client_response: ClientResponse,
    request: ForwardedRequest,
    response: UpstreamResponse,
    own_body: bytes | None,
) -> None:
    """Make the head of the client's response from that of the upstream's. `own_body` is what the
    client gets in place of the upstream's body, None if it gets that."""
    request_id = client_response.set_head(
        response, request.client_request.id, request.admission.headers()
    )
    if own_body is not None:
        client_response.set_json(len(own_body))
    request.note_answer(response.status, readable_id(request_id))
    if request.gateway.catalog.is_set:
        etag = request.catalog_etag() if request.endpoint is RESPONSES else None
        client_response.replace_header(MODELS_ETAG, etag)
