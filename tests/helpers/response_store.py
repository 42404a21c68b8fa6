"""An upstream that stores responses, and the request that has one stored."""

from __future__ import annotations

import itertools
from typing import Any

from tests.helpers.gateway import Gateway
from tests.helpers.upstream import (
    RESPONSE_USAGE,
    Received,
    Reply,
    Script,
    event,
    json_answer,
    response_object,
    stream,
)

BODY = {"model": "gpt-up", "input": "Hi"}


class ResponseStore:
    """The script of an upstream that stores responses. A background response is completed when it
    is read for the `turns`th time. The first response has the number `first` in its id."""

    def __init__(self, turns: int = 2, first: int = 1) -> None:
        self.turns = turns
        self.responses: dict[str, dict[str, Any]] = {}
        self.looks: dict[str, int] = {}
        self._numbers = itertools.count(first)

    async def __call__(self, request: Received, reply: Reply) -> None:
        await self._script(request)(request, reply)

    def _script(self, request: Received) -> Script:
        path, _, query = request.path.partition("?")
        if request.method == "POST" and path == "/v1/responses":
            return self._create(request.json())
        response_id, _, suffix = path.removeprefix("/v1/responses/").partition("/")
        if response_id not in self.responses:
            return json_answer({"error": {"message": "gone", "type": "invalid_request_error"}}, 404)
        if request.method == "DELETE":
            del self.responses[response_id]
            return json_answer({"id": response_id, "object": "response", "deleted": True})
        if suffix == "cancel":
            self.responses[response_id] |= {"status": "cancelled", "usage": None}
        elif suffix == "input_items":
            return json_answer({"object": "list", "data": [{"id": "msg_in"}], "has_more": False})
        else:
            self._look(response_id)
        response = self.responses[response_id]
        if "stream=true" in query:
            created = {**response, "status": "in_progress", "usage": None}
            events = [("response.created", created), ("response.completed", response)]
            return stream([event({"type": n, "response": r}, n) for n, r in events])
        return json_answer(response)

    def _look(self, response_id: str) -> None:
        self.looks[response_id] = self.looks.get(response_id, 0) + 1
        if self.responses[response_id]["status"] == "queued" and (
            self.looks[response_id] >= self.turns
        ):
            self.responses[response_id] |= {"status": "completed", "usage": RESPONSE_USAGE}

    def _create(self, body: dict[str, Any]) -> Script:
        number = next(self._numbers)
        response = response_object(body["model"], id=f"resp_{number:08}")
        response["output"][0]["id"] = f"msg_{number:08}"
        if body.get("background"):
            response |= {"status": "queued", "usage": None, "output": []}
        self.responses[response["id"]] = response
        if not body.get("stream"):
            return json_answer(response)
        begun = {**response, "status": "in_progress", "output": [], "usage": None}
        item = {"id": f"msg_{number:08}"}
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": begun},
            {"type": "response.output_item.added", "item": item},
        ]
        if not body.get("background"):
            events.append({"type": "response.completed", "response": response})
        return stream([event(each, each["type"]) for each in events])


def create(gateway: Gateway, key: str, **more: Any) -> dict[str, Any]:
    """Return the response to a request with these fields."""
    with gateway.client(key) as client:
        answer = client.post("/responses", json={**BODY, **more})
        assert answer.status_code == 200, answer.text
        response: dict[str, Any] = answer.json()
        return response
