"""Requests of every kind, over good and bad paths, full of canaries; and an upstream whose answers
are full of canaries as well. Each way to send a request is a method of `Ways`."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
from typing import Any, Self

import httpx2
from websockets.exceptions import WebSocketException

from tests.helpers.canaries import TAG, new_canary
from tests.helpers.gateway import PATIENCE_SECONDS, Gateway
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    chat_json,
    chat_pieces,
    event,
    images_pieces,
    json_answer,
    response_object,
    response_pieces,
    stream,
    ws_events,
)
from tests.helpers.websocket_client import opened
from tests.request_body.packers import PACKERS, UNPACKERS

MODEL = re.compile(rb'"?model"(?:: ?"|\r\n\r\n)gpt-(\w+)')
MAX_BODY = 256 << 10
STATUSES = (400, 401, 403, 404, 429, 500, 503)


class Quoting:
    """The script of an upstream. The model that is asked for says how; each answer has canaries of
    its own, and each error quotes the request."""

    def __init__(self, upstream: Upstream) -> None:
        self.received: set[str] = set()  # the canaries that have come, whole
        self._numbers = 0
        upstream.script, upstream.talk = self.answer, self.talk

    def _note(self, text: bytes) -> str:
        """Note the canaries in a request, and return one."""
        found = CANARY.findall(text)
        self.received.update(each.decode() for each in found)
        return found[0].decode() if found else new_canary()

    async def answer(self, request: Received, reply: Reply) -> None:
        packed = request.header("content-encoding")
        body = UNPACKERS[packed](request.body) if packed in UNPACKERS else request.body
        said = self._note(body + b"".join(value for _, value in request.headers))
        way = found[1].decode() if (found := MODEL.search(body)) else "fine"
        self._numbers += 1
        request.body = b""
        await self._script(request, body, way, said)(request, reply)

    def _script(self, request: Received, body: bytes, way: str, said: str) -> Any:
        path = request.path.partition("?")[0].removeprefix("/failing").removeprefix("/v1")
        echo = {"x-echo": f"{said} {new_canary()}"}
        if path.startswith("/models"):
            return json_answer({"object": "list", "data": [{"id": "gpt-fine"}]})
        if request.path.startswith("/failing"):
            return json_answer(quoting_error(said), 503, echo)
        if way.isdigit():
            return json_answer(quoting_error(said), int(way), echo)
        made = f"resp_{self._numbers:08}"
        if request.method != "POST" or path.endswith("/cancel"):
            return json_answer(response_of(path.split("/")[2], said), 200, echo)
        if way == "packed":
            head = {"content-encoding": "gzip", **echo}
            return json_answer(
                gzip.compress(json.dumps(response_of(made, said)).encode()), 200, head
            )
        if way == "text":
            return json_answer(f"{said} {new_canary()}".encode(), 200, echo, "text/plain")
        if path == "/chat/completions" and b'"stream": true' in body:
            return stream(chat_pieces([said, new_canary()]), headers=echo)
        if path == "/chat/completions":
            return chat_json()
        if path.startswith("/images"):
            begun = event({"type": "image_edit.partial_image", "b64_json": said})
            return stream([begun, *images_pieces(1, kind="image_edit")], headers=echo)
        if b'"stream": true' in body or way in ("torn", "failed", "endless"):
            pieces = response_pieces([said, new_canary()])
            if way == "torn":
                return stream(pieces[:4], end="tear")
            if way == "endless":
                return stream(pieces[:4] + [b": x\n\n"] * 1000, 0.05)
            if way == "failed":
                error = quoting_error(said)["error"]
                last = response_object(status="failed", error=error, usage=None)
                pieces[-1] = event({"type": "response.failed", "response": last})
            return stream(pieces, headers=echo)
        status = "queued" if b'"background": true' in body else "completed"
        return json_answer(response_of(made, said, status), 200, echo)

    async def talk(self, sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            said = self._note(sock.texts[-1])
            way = frame.get("model", "gpt-steered").removeprefix("gpt-")
            self._numbers += 1
            if way.isdigit():
                await sock.send({"type": "error", "status": int(way), **quoting_error(said)})
            elif way == "nonsense":
                await sock.send(f"{said} is no JSON".encode())
                sock.tear()
            else:
                created, delta, done = ws_events(self._numbers, {"model": "gpt-fine", **frame})
                await sock.send(created, {**delta, "delta": said + new_canary()})
                if way == "torn":
                    sock.tear()
                await sock.send(done)


def quoting_error(said: str) -> dict[str, Any]:
    """Return an error object all of whose members quote a request, the code in a form that no code
    has."""
    quote = f"You said {said} {new_canary()}"
    return {"error": {"message": quote, "type": quote, "code": quote, "param": quote}}


def response_of(response_id: str, said: str, status: str = "completed") -> dict[str, Any]:
    response = response_object("gpt-fine", status=status, id=response_id)
    response["output"][0]["content"][0]["text"] = f"{said} {new_canary()}"
    if status != "completed":
        response |= {"usage": None, "output": []}
    return {**response, "metadata": {new_canary(): new_canary()}}


CANARY = re.compile(rb"(?:%b[A-Za-z0-9]{3}){6}" % TAG.encode())


class Ways:
    """Ways to send requests with canaries. Each of ALL sends one request, or a few that belong
    together, and returns what was answered."""

    def __init__(self, gateway: Gateway, key: str, seconds: float = PATIENCE_SECONDS) -> None:
        """`seconds` are those in which an answer is waited for."""
        self.made: list[str] = []
        self._gateway = gateway
        self._key = key
        self._seconds = seconds
        self._http = gateway.client(key, timeout=seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def text(self) -> str:
        """Return a new canary."""
        self.made.append(new_canary())
        return self.made[-1]

    def body(self, way: str = "fine", **more: Any) -> dict[str, Any]:
        """Return a request for a response with canaries in all places that content can have."""
        call = {"type": "function_call", "call_id": self.text(), "name": self.text()}
        parameters = {"type": "object", "properties": {self.text(): {"description": self.text()}}}
        image = {"type": "input_image", "image_url": f"data:image/png;base64,{self.text()}"}
        return {
            "model": f"gpt-{way}",
            "instructions": self.text(),
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": self.text()}, image]},
                {"id": self.text(), "type": "message", "role": "user", "content": self.text()},
                {**call, "arguments": json.dumps({"query": self.text()})},
                {"type": "function_call_output", "call_id": "a", "output": f'\n"{self.text()}'},
            ],
            "tools": [{"type": "function", "name": self.text(), "parameters": parameters}],
            "metadata": {self.text(): self.text()},
            "user": self.text(),
            "prompt_cache_key": self.text(),
            **more,
        }

    def headers(self) -> dict[str, str]:
        """Return headers with canaries: forwarded ones, and others."""
        names = "idempotency-key session-id user-agent x-stainless-os x-codex-any referer cookie"
        return {name: self.text() for name in names.split()}

    def post(self, path: str, **request: Any) -> bytes:
        """Send a request with canaries in its headers."""
        headers = self.headers() | request.pop("headers", {})
        with contextlib.suppress(httpx2.HTTPError):
            return self._http.post(path, headers=headers, **request).content
        return b""

    def json(self) -> bytes:
        return self.post("/responses", json=self.body())

    def stream(self) -> bytes:
        return self.post("/responses", json=self.body(stream=True))

    def chat(self) -> bytes:
        """Have `include_usage` added to the body, and taken out of the answer."""
        messages = [{"role": "user", "content": self.text()} for _ in range(8)]
        return self.post(
            "/chat/completions",
            content=json.dumps({"model": "gpt-fine", "stream": True, "messages": messages}),
            headers={"content-type": "application/json"},
        )

    def form(self) -> bytes:
        image = (f"{self.text()}.png", f"{self.text()}".encode() * 10, "image/png")
        data = {"model": "gpt-fine", "prompt": self.text(), "stream": "true", "user": self.text()}
        return self.post("/images/edits", data=data, files={"image": image})

    def recording(self) -> bytes:
        file = (f"{self.text()}.mp3", self.text().encode() * 10, "audio/mpeg")
        data = {"model": "gpt-text", "prompt": self.text()}
        return self.post("/audio/transcriptions", data=data, files={"file": file})

    def embeddings(self) -> bytes:
        texts = [self.text() for _ in range(8)]
        return self.post("/embeddings", json={"model": "gpt-fine", "input": texts})

    def packed(self) -> bytes:
        """Send compressed bodies, whose answers are compressed, too."""
        answers = b""
        for coding, pack in PACKERS.items():
            head = {"content-type": "application/json", "content-encoding": coding}
            content = pack(json.dumps(self.body("packed")).encode())
            answers += self.post("/responses", content=content, headers=head)
        return answers

    def stored(self) -> bytes:
        """Create a response, read it, and delete it."""
        answer = self.post("/responses", json=self.body())
        return answer + self._read_and_end(answer, "DELETE", "")

    def background(self) -> bytes:
        answer = self.post("/responses", json=self.body(background=True))
        return answer + self._read_and_end(answer, "POST", "/cancel")

    def _read_and_end(self, answer: bytes, method: str, suffix: str) -> bytes:
        with contextlib.suppress(ValueError, KeyError, httpx2.HTTPError):
            path = f"/responses/{json.loads(answer)['id']}"
            answer = self._http.get(path, headers=self.headers()).content
            answer += self._http.get(f"{path}/input_items").content
            return answer + self._http.request(method, path + suffix).content
        return b""

    def errors(self) -> bytes:
        """Have the upstream answer with errors, before and within its answer, and break off."""
        ways = (*map(str, STATUSES), "torn", "failed")
        return b"".join(self.post("/responses", json=self.body(way)) for way in ways)

    def failover(self) -> bytes:
        return self.post("/responses", json=self.body("failing"))

    def invalid(self) -> bytes:
        """Send bodies that can't be read, or are refused for what is in them."""
        said, head = self.text(), {"content-type": "application/json"}
        broken = (
            f'{{"model": "gpt-fine", "input": "{said}',
            f'{{"model": "gpt-fine", "input": "{said}\\x"}}',
            f'{{"model": "gpt-fine", "{said}": 1, "{said}": 2}}',
            f'{{"model": "gpt-fine", "input": ["{said}"], "stream": "{said}"}}',
            f'{{"model": "gpt-fine", "n": "{said}", "max_tokens": "{said}"}}',
            f'{{"model": ["{said}"], "input": "{said}"}}',
            f'["{said}"]',
            "[" * 5000 + said,
            said + "x" * MAX_BODY,
        )
        answers = [self.post("/responses", content=each, headers=head) for each in broken]
        for more in (
            {"previous_response_id": self.text()},
            {"conversation": self.text()},
            {"background": self.text()},
            {"stream_options": {"include_usage": self.text()}},
            {"prompt": {"id": self.text()}},
            {"request_id": self.text()},
            {"service_tier": self.text()},
        ):
            answers.append(self.post("/responses", json=self.body(**more)))
        for kind in ("text/plain", f"text/{said}", f"multipart/form-data; boundary={said}"):
            answers.append(self.post("/images/edits", content=said, headers={"content-type": kind}))
        form = f'--x\r\ncontent-disposition: form-data; name="{said}[]"; {said}\r\n\r\n{said}\r\n'
        head = {"content-type": "multipart/form-data; boundary=x"}
        answers.append(self.post("/images/edits", content=form.encode(), headers=head))
        head = {"content-type": "application/json", "content-encoding": "gzip"}
        answers.append(self.post("/responses", content=said.encode(), headers=head))
        return b"".join(answers)

    def unknown(self) -> bytes:
        """Ask for what is not there, with canaries in the path, the query and the key."""
        answers = [self.post(f"/{self.text()}?{self.text()}={self.text()}", content=self.text())]
        for path in (f"/responses/{self.text()}", f"/models/{self.text()}?{self.text()}"):
            with contextlib.suppress(httpx2.HTTPError):
                answers.append(self._http.get(path).content)
        wrong = {"authorization": f"Bearer sk-redbtc-{self.text()}"}
        answers.append(self.post("/responses", json=self.body(), headers=wrong))
        return b"".join(answers)

    def raw(self) -> bytes:
        """Break the rules of HTTP, and stop within a body."""
        head = f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {self._key}\r\n"
        head += "content-type: application/json\r\n"
        said = self.text()
        answers = [
            self._raw(f"{said} {said}\r\n\r\n"),
            self._raw(f"{head}{said}: {said}\r\n {said}\r\n\r\n"),
            self._raw(f"{head}content-length: {said}\r\n\r\n{said}"),
            self._raw(f"{head}transfer-encoding: chunked\r\n\r\n{said}\r\n{said}\r\n"),
            self._raw(f"{head}content-length: 200\r\n\r\n{said}", leaves=True),
            self._raw(f"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n{said} {said}\r\n\r\n"),
        ]
        return b"".join(answers)

    def _raw(self, text: str, leaves: bool = False) -> bytes:
        with self._gateway.connect() as sock, contextlib.suppress(OSError):
            sock.sendall(text.encode())
            if leaves:
                return b""
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))
        return b""

    def leaving(self) -> bytes:
        """Leave in the middle of an answer."""
        with contextlib.ExitStack() as stack:
            return self.begin_endless(stack)

    def begin_endless(self, stack: contextlib.ExitStack) -> bytes:
        """Begin a stream, which goes on until the end of `stack`; return the first events."""
        body = self.body("endless", stream=True)
        sock = stack.enter_context(self._gateway.begin(self._key, body))
        answer = b""
        while b"delta" not in answer and (part := sock.recv(65536)):
            answer += part
        return answer

    def turn(self) -> bytes:
        """Send one request over a WebSocket."""
        return self._session(json.dumps({"type": "response.create"} | self.body()))

    def websocket(self) -> bytes:
        """Send events that are answered, refused, answered with errors, or never answered."""
        create = {"type": "response.create"}
        events: list[str | bytes] = [
            json.dumps(create | self.body(way)) for way in ("fine", "400", "429", "500", "fine")
        ]
        answers, said = b"", self.text()
        events += [
            f'{{"{said}',
            json.dumps({"type": said, said: said}),
            json.dumps(create | self.body(previous_response_id=self.text())),
            json.dumps({"type": "response.steer", "input": said, "previous_response_id": said}),
        ]
        for last in (json.dumps(create | self.body("torn")), f'"{said}"'.encode(), said * 20_000):
            answers += self._session(*events, last)
        return answers

    def _session(self, *messages: str | bytes) -> bytes:
        """Send messages over a WebSocket, each when the one before is answered."""
        answers, headers = "", {"authorization": f"Bearer {self._key}", **self.headers()}
        with (
            contextlib.suppress(WebSocketException, OSError, ValueError),
            opened(self._gateway, headers, self._seconds) as client,
        ):
            for each in messages:
                client.raw(each)
                kind = ""
                while kind not in ("response.completed", "error"):
                    answers += (text := client.recv_text(self._seconds))
                    kind = json.loads(text)["type"]
        return answers.encode()

    def dashboard(self) -> bytes:
        """Send what a page or the admin API can't take."""
        answers = b""
        for path in ("/dashboard/login", "/admin/v1/me", f"/dashboard/{self.text()}"):
            for method in ("GET", "POST"):
                with contextlib.suppress(httpx2.HTTPError):
                    answers += self._http.request(
                        method,
                        self._gateway.url + path,
                        params={self.text(): self.text()},
                        data={"email": self.text(), "password": self.text()},
                    ).content
        return answers


ALL = (
    *(Ways.json, Ways.stream, Ways.chat, Ways.form, Ways.recording, Ways.embeddings, Ways.packed),
    *(Ways.stored, Ways.background, Ways.errors, Ways.failover, Ways.invalid, Ways.unknown),
    *(Ways.raw, Ways.leaving, Ways.websocket, Ways.dashboard),
)


def settings(upstream: Upstream) -> dict[str, Any]:
    """Return settings with a second upstream, for `gpt-failing`, that answers with errors."""
    usual = {"api_key_env": "TEST_UPSTREAM_KEY"}
    failing = {**usual, "name": "failing", "base_url": upstream.url.replace("/v1", "/failing/v1")}
    return {
        "server": {"log_level": "debug", "max_body_bytes": MAX_BODY},
        "metering": {"drain_seconds": 0},
        "upstreams": [
            {**failing, "models": ["gpt-failing"], "weight": 1_000_000},
            {**usual, "name": "test", "base_url": upstream.url},
        ],
    }
