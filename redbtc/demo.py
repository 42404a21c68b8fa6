"""The demonstration upstream, to try the gateway with: canned answers, exact token counts.

It speaks enough of OpenAI's API that curl, the SDKs and Codex CLI work with it. A token here is a
run of word characters, or one other character that is not a space; an image has 64 squares, which
are one token each. The usage counts all text in the messages of the request, and exactly the text
of the response. Tools and images to edit are ignored, and count nothing. No key is checked, and
nothing is stored.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import struct
import textwrap
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator
from email.message import Message
from typing import Any, NamedTuple

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from redbtc.refusals import Refusal
from redbtc.request_body.media import decompressed
from redbtc.slices import in_slices

WORD = re.compile(r"\w+|[^\w\s]")
MAX_BYTES = 100 << 20  # of a compressed body, once decompressed
PAUSE_SECONDS = 0.02  # between two events of a stream
TEXT_FIELDS = ("instructions", "messages", "input", "content", "text", "output", "arguments")
MODEL: dict[str, Any] = {"object": "model", "created": 1764547200, "owned_by": "redbtc"}
MODELS = {name: {"id": name} | MODEL for name in ("redbtc-demo", "redbtc-demo-image")}
Json = dict[str, Any]


class Reply(NamedTuple):
    """The text that a request is answered with."""

    text: str
    truncated: bool  # by the request's maximum of output tokens
    input_tokens: int  # of the request

    def words(self) -> list[str]:
        """Return the text in pieces of one word, each with the space before it."""
        return re.findall(r"\s*\S+", self.text)

    def usage(self, input_name: str, output_name: str) -> Json:
        """Return the usage. /chat/completions and /responses name the two kinds of tokens
        differently."""
        output_tokens = token_count(self.text)
        return {
            f"{input_name}_tokens": self.input_tokens,
            f"{input_name}_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            f"{output_name}_tokens": output_tokens,
            f"{output_name}_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.input_tokens + output_tokens,
        }


def token_count(text: str) -> int:
    """Return the number of tokens in a text."""
    return len(WORD.findall(text))


def texts(content: Any) -> Iterator[str]:
    """Yield the texts in a body, an item or a list of them, at any depth; no ids and no files."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from texts([content.get(name) for name in TEXT_FIELDS])
    elif isinstance(content, list):
        for part in content:
            yield from texts(part)


def reply_to(body: Json, messages: Any, max_tokens: Any) -> Reply:
    """Return a reply of at most `max_tokens` tokens (None means no limit), which quotes the user's
    last message."""
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise HTTPException(400, "The output token limit must be a whole number of at least 1.")
    if isinstance(messages, list):
        messages = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"][-1:]
    asked = " ".join(texts(messages)).lstrip()[:200]
    text = (
        "This is a canned answer from the RedBTC demonstration upstream. You said: "
        f'"{textwrap.shorten(asked, 60, placeholder="…")}". The token counts are exact.'
    )
    ends = [token.end() for token in WORD.finditer(text)][:max_tokens]
    return Reply(text[: ends[-1]], ends[-1] < len(text), sum(map(token_count, texts(body))))


async def read(request: Request) -> Json:
    """Return the fields of a request's body, which is JSON or a form. Refuse a body that can't be
    read or names no model."""
    kind = request.headers.get("content-type", "")
    try:
        raw, encoding = await request.body(), request.headers.get("content-encoding", "")
        if encoding in ("gzip", "zstd"):
            raw = bytes(await in_slices(decompressed(raw, encoding, MAX_BYTES), ""))
        is_form = kind.lower().startswith("multipart/")
        body = form_fields(kind, raw) if is_form else orjson.loads(raw)
    except (ClientDisconnect, orjson.JSONDecodeError, Refusal):
        raise HTTPException(400, "The request body is not valid JSON.") from None
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise HTTPException(400, "You must provide a model parameter.")
    return body


def form_fields(content_type: str, raw: bytes) -> Json:
    """Return the fields of a multipart form (RFC 7578) without its files."""
    header, fields = Message(), {}
    header["content-type"] = content_type
    for part in (b"\r\n" + raw).split(f"\r\n--{header.get_boundary('?')}".encode()):
        head, _, value = part.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="?([^";\r]+)', head)
        if name and b"filename" not in head:
            fields[name[1].decode(errors="replace")] = value.decode(errors="replace")
    return fields


def random_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def whole_response(content: Json, status: int = 200) -> Response:
    headers = {"x-request-id": random_id("req"), "content-type": "application/json"}
    return Response(orjson.dumps(content), status, headers)


def event_response(events: list[Json], end: bytes = b"") -> Response:
    """Return a response of server-sent events, with a pause after each. An event with a type has
    that as its name."""

    async def paced() -> AsyncIterator[bytes]:
        for event in events:
            name = f"event: {event['type']}\n" if "type" in event else ""
            yield name.encode() + b"data: " + orjson.dumps(event) + b"\n\n"
            await asyncio.sleep(PAUSE_SECONDS)
        yield end

    headers = {"x-request-id": random_id("req"), "content-type": "text/event-stream"}
    return StreamingResponse(paced(), headers=headers)


async def refuse(_: Request, error: Exception) -> Response:
    """Return an error in the form of OpenAI's API; the router's 404 and 405, too."""
    assert isinstance(error, HTTPException)
    form = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return whole_response({"error": form}, error.status_code)


async def chat(request: Request) -> Response:
    """Serve POST /v1/chat/completions."""
    body = await read(request)
    limits = [body.get("max_completion_tokens"), body.get("max_tokens")]
    max_tokens = next((limit for limit in limits if limit is not None), None)
    reply = reply_to(body, body.get("messages"), max_tokens)
    finish, usage = "length" if reply.truncated else "stop", reply.usage("prompt", "completion")
    head: Json = {"id": random_id("chatcmpl"), "created": int(time.time())}
    head |= {"model": body["model"], "service_tier": "default"}
    if not body.get("stream"):
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": reply.text, "refusal": None}}
        return whole_response(
            head | {"object": "chat.completion", "choices": [choice], "usage": usage}
        )
    usage_wanted = (body.get("stream_options") or {}).get("include_usage")
    head |= {"object": "chat.completion.chunk"} | ({"usage": None} if usage_wanted else {})
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in reply.words())]
    choices: list[Json] = [{"index": 0, "delta": each, "finish_reason": None} for each in deltas]
    choices += [{"index": 0, "delta": {}, "finish_reason": finish}]
    last = [head | {"choices": [], "usage": usage}] if usage_wanted else []
    return event_response(
        [head | {"choices": [each]} for each in choices] + last, b"data: [DONE]\n\n"
    )


async def responses(request: Request) -> Response:
    """Serve POST /v1/responses."""
    body = await read(request)
    reply = reply_to(body, body.get("input"), body.get("max_output_tokens"))
    begun: Json = {"id": random_id("resp"), "object": "response", "created_at": int(time.time())}
    begun |= {"status": "in_progress", "model": body["model"], "output": [], "usage": None}
    begun |= {"error": None, "incomplete_details": None, "instructions": None, "metadata": {}}
    begun |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "store": False}
    begun |= {"service_tier": "default", "temperature": 1.0, "top_p": 1.0}
    status = "incomplete" if reply.truncated else "completed"
    item: Json = {"id": random_id("msg"), "type": "message", "role": "assistant"}
    item |= {"status": status, "content": [output_text(reply.text)]}
    ended = begun | {"status": status, "output": [item], "usage": reply.usage("input", "output")}
    ended |= {"incomplete_details": {"reason": "max_output_tokens"} if reply.truncated else None}
    if body.get("stream"):
        return event_response(response_events(begun, ended, reply))
    return whole_response(ended)


def output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def response_events(begun: Json, ended: Json, reply: Reply) -> list[Json]:
    item = ended["output"][0]
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    text = place | {"logprobs": []}
    item_begun = item | {"status": "in_progress", "content": []}
    events = [
        ("created", {"response": begun}),
        ("in_progress", {"response": begun}),
        ("output_item.added", {"output_index": 0, "item": item_begun}),
        ("content_part.added", place | {"part": output_text("")}),
        *(("output_text.delta", text | {"delta": word}) for word in reply.words()),
        ("output_text.done", text | {"text": reply.text}),
        ("content_part.done", place | {"part": output_text(reply.text)}),
        ("output_item.done", {"output_index": 0, "item": item}),
        (ended["status"], {"response": ended}),
    ]
    return [
        {"type": f"response.{name}", "sequence_number": number} | content
        for number, (name, content) in enumerate(events)
    ]


async def images(request: Request) -> Response:
    """Serve POST /v1/images/generations and /v1/images/edits."""
    body = await read(request)
    prompt, partial = str(body.get("prompt", "")), str(body.get("partial_images") or 0)
    if partial not in ("0", "1", "2", "3"):
        raise HTTPException(400, "partial_images must be from 0 to 3.")
    image = {"b64_json": base64.b64encode(picture(prompt)).decode()}
    about = {"output_format": "png", "quality": "low", "size": "64x64", "background": "opaque"}
    text = token_count(prompt)
    usage: Json = {"input_tokens": text, "output_tokens": 64, "total_tokens": text + 64}
    usage |= {"input_tokens_details": {"text_tokens": text, "image_tokens": 0}}
    usage |= {"output_tokens_details": {"text_tokens": 0, "image_tokens": 64}}
    created = int(time.time())
    if body.get("stream") not in (True, "true"):
        return whole_response({"created": created, "data": [image], "usage": usage} | about)
    kind = "image_edit" if request.url.path.endswith("edits") else "image_generation"
    head = {"created_at": created} | image | about
    rough = head | {"type": f"{kind}.partial_image"}
    partials = [rough | {"partial_image_index": index} for index in range(int(partial))]
    return event_response([*partials, head | {"type": f"{kind}.completed", "usage": usage}])


def picture(prompt: str) -> bytes:
    """Return a PNG image of 64 by 64 pixels: 8 rows of 8 squares, in colours that depend on the
    prompt."""
    colours = hashlib.shake_256(prompt.encode()).digest(3 * 64)
    squares = [colours[at : at + 3] * 8 for at in range(0, 3 * 64, 3)]
    rows = [b"\0" + b"".join(squares[at : at + 8]) for at in range(0, 64, 8)]
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    pixels = zlib.compress(b"".join(row * 8 for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


async def models(request: Request) -> Response:
    """Serve GET /v1/models and /v1/models/{id}."""
    name = request.path_params.get("id")
    if name is None:
        return whole_response({"object": "list", "data": list(MODELS.values())})
    if name not in MODELS:
        raise HTTPException(404, "The model does not exist.")
    return whole_response(MODELS[name])


def app() -> Starlette:
    """Return the demonstration upstream as an ASGI app."""
    posts = {"chat/completions": chat, "responses": responses}
    posts |= {"images/generations": images, "images/edits": images}
    routes = [Route(f"/v1/{path}", handler, methods=["POST"]) for path, handler in posts.items()]
    routes += [Route("/v1/models", models), Route("/v1/models/{id:path}", models)]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})
