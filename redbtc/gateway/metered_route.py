"""The path of a metered request over HTTP."""

from __future__ import annotations

from redbtc.deadlines import Deadline
from redbtc.gateway.body_recorder import BodyRecorder
from redbtc.gateway.endpoints import Endpoint
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.metered_request import MeteredRequest
from redbtc.gateway.reading import read_content
from redbtc.gateway.references import candidates_for
from redbtc.gateway.relay import Relay
from redbtc.limits.memory import Reservation
from redbtc.server.asgi import Receive, Scope, Send, request_of


class MeteredRoute:
    """The ASGI app of an endpoint whose requests are metered."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._gateway = gateway
        self._needs_price = endpoint.needs_price

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, endpoint, client_request = self._gateway, self._endpoint, request_of(scope)
        client_request.route = endpoint.path
        key, settings = gateway.authenticate(client_request), gateway.settings
        deadline = Deadline(gateway.deadlines)
        # Nothing is awaited between `authenticate` and `serving`: if the key is reported as
        # compromised, the request is either refused or aborted.
        charged = gateway.limiter.charge(key, settings.limits)
        with (
            charged as admission,
            gateway.serving(client_request.client, deadline, key),
            Reservation(gateway.limiter, key, settings) as memory,
        ):
            client_request.received = memory
            body = await read_content(
                client_request.headers, receive, deadline, settings, memory, endpoint
            )
            client_request.received = body
            candidates = await candidates_for(
                gateway, key, client_request, body, needs_price=self._needs_price
            )
            request = MeteredRequest(
                gateway, client_request, endpoint, deadline, admission, key, body
            )
            if request.may_add_usage:
                request.takes_out_usage = body.add_include_usage()
            async with request.admit(candidates, memory):
                if key.log_days is not None:
                    recorder = BodyRecorder.begin(gateway, key, client_request.id)
                    if recorder:
                        request.recorder = recorder
                        send = recorder.recorded(send, client_request.client, deadline)
                        await recorder.take_body(body, client_request.headers)
                path = endpoint.path.removeprefix("/v1")
                relay = Relay(request, send, "POST", path, body.sent)
                body.sent = b""  # only the relay has it now, for as long as it can be needed
                await relay.forward(candidates)
