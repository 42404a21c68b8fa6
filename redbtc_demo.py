"""An upstream to try the gateway with: no model, truthful usage.

It speaks enough of OpenAI's API that curl, the SDKs and Codex CLI work against it. What it says
names itself and quotes the question. A token here is a run of word characters or one other sign;
what it reports as used is exactly what it was sent and what it says.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import re
import secrets
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from email.parser import BytesParser
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

TOKEN = re.compile(r"\w+|[^\w\s]")
PAUSE_SECONDS = 0.02  # between two words
Json = dict[str, Any]


def count(text: str) -> int:
    """How many tokens a text has."""
    return len(TOKEN.findall(text))


def texts(content: Any) -> Iterator[str]:
    """All text in a message's content, an item or a list of them, however nested."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from itertools.chain.from_iterable(map(texts, content))
    elif isinstance(content, dict):
        for name in ("text", "content", "output", "arguments"):
            yield from texts(content.get(name))


def speak(question: str, most_tokens: int | None) -> tuple[list[str], bool]:
    """The answer, in pieces of one word each, and whether it was cut short."""
    quoted = " ".join(question.split()[-12:])
    text = f'This is the RedBTC demonstration upstream; no model is behind it. You said: "{quoted}"'
    pieces = re.findall(r"\s*\S+", text)
    if most_tokens is None:
        return pieces, False
    whole = [pieces[:n] for n in range(len(pieces) + 1)]
    fits = [said for said in whole if count("".join(said)) <= most_tokens]
    return fits[-1], len(fits) < len(whole)


def error(message: str, param: str | None = None) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return answer({"error": body}, 400)


def answer(content: Any, status: int = 200) -> Response:
    headers = {"x-request-id": f"req_demo_{secrets.token_hex(8)}"}
    return Response(orjson.dumps(content), status, headers, "application/json")


def stream(events: AsyncIterator[bytes]) -> Response:
    headers = {"x-request-id": f"req_demo_{secrets.token_hex(8)}"}
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


def sse(content: Any, name: str = "") -> bytes:
    line = f"event: {name}\n".encode() if name else b""
    return line + b"data: " + orjson.dumps(content) + b"\n\n"


def needs_model(handler: Callable[[Json], Response]) -> Callable[[Request], Any]:
    """The handler of a JSON body that must name a model."""

    async def checked(request: Request) -> Response:
        try:
            body = orjson.loads(await request.body())
        except orjson.JSONDecodeError:
            return error("The request body is not valid JSON.")
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            return error("You must provide a model parameter.", "model")
        return handler(body)

    return checked


def chat(body: Json) -> Response:
    """POST /v1/chat/completions"""
    messages = list(texts(body.get("messages")))
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    pieces, cut = speak(messages[-1] if messages else "", most)
    used_in, used_out = sum(map(count, messages)), count("".join(pieces))
    usage = {
        "prompt_tokens": used_in,
        "completion_tokens": used_out,
        "total_tokens": used_in + used_out,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    finish = "length" if cut else "stop"
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
    head |= {"model": body["model"], "service_tier": "default"}
    if not body.get("stream"):
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return answer(head | {"object": "chat.completion", "choices": [choice], "usage": usage})
    wanted = bool((body.get("stream_options") or {}).get("include_usage"))
    return stream(chat_events(head, pieces, finish, usage, wanted))


async def chat_events(
    head: Json, pieces: list[str], finish: str, usage: Json, wanted: bool
) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"} | ({"usage": None} if wanted else {})

    def chunk(delta: Json, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse(head | {"choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    for piece in pieces:
        yield chunk({"content": piece})
        await asyncio.sleep(PAUSE_SECONDS)
    yield chunk({}, finish)
    if wanted:
        yield sse(head | {"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def responses(body: Json) -> Response:
    """POST /v1/responses"""
    asked = list(texts(body.get("input")))
    pieces, cut = speak(asked[-1] if asked else "", body.get("max_output_tokens"))
    used_in = sum(map(count, [*texts(body.get("instructions")), *asked]))
    used_out = count("".join(pieces))
    usage = {
        "input_tokens": used_in,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": used_out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used_in + used_out,
    }
    response = {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": body["model"],
        "output": [],
        "parallel_tool_calls": True,
        "service_tier": "default",
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None,
    }
    part = {"type": "output_text", "text": "".join(pieces), "annotations": []}
    item = {"id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant"}
    done: Json = {"status": "incomplete" if cut else "completed", "usage": usage}
    done |= {"output": [item | {"status": done["status"], "content": [part]}]}
    done |= {"incomplete_details": {"reason": "max_output_tokens"} if cut else None}
    if not body.get("stream"):
        return answer(response | done)
    return stream(response_events(response, response | done, pieces))


async def response_events(begun: Json, ended: Json, pieces: list[str]) -> AsyncIterator[bytes]:
    numbers = itertools.count()
    item = ended["output"][0]
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}

    def event(name: str, content: Json) -> bytes:
        return sse({"type": name, "sequence_number": next(numbers), **content}, name)

    yield event("response.created", {"response": begun})
    yield event("response.in_progress", {"response": begun})
    empty = item | {"status": "in_progress", "content": []}
    yield event("response.output_item.added", {"output_index": 0, "item": empty})
    yield event("response.content_part.added", place | {"part": part})
    for piece in pieces:
        yield event("response.output_text.delta", place | {"delta": piece, "logprobs": []})
        await asyncio.sleep(PAUSE_SECONDS)
    text = "".join(pieces)
    yield event("response.output_text.done", place | {"text": text, "logprobs": []})
    yield event("response.content_part.done", place | {"part": part | {"text": text}})
    yield event("response.output_item.done", {"output_index": 0, "item": item})
    yield event(f"response.{ended['status']}", {"response": ended})


def picture(prompt: str, size: int = 64) -> bytes:
    """A PNG of its own for each prompt."""
    red, green, blue, step = hashlib.sha256(prompt.encode()).digest()[:4]
    rows = (
        b"\0" + bytes(c for x in range(size) for c in (red ^ x * step & 255, green ^ y * 4, blue))
        for y in range(size)
    )

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    packed = zlib.compress(b"".join(rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


async def images(request: Request) -> Response:
    """POST /v1/images/generations and /v1/images/edits"""
    raw = await request.body()
    fields = form_fields(request, raw)
    if fields is None:
        try:
            fields = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return error("The request body is not valid JSON.")
    prompt = str(fields.get("prompt", ""))
    image = picture(prompt)
    used_in, used_out = count(prompt), len(image) // 64 + 1  # a token for each 64 bytes of picture
    usage = {
        "input_tokens": used_in,
        "input_tokens_details": {"text_tokens": used_in, "image_tokens": 0},
        "output_tokens": used_out,
        "total_tokens": used_in + used_out,
    }
    encoded = base64.b64encode(image).decode()
    about = {"background": "opaque", "output_format": "png", "quality": "low", "size": "64x64"}
    head = about | {"usage": usage}
    if str(fields.get("stream", "")).lower() != "true":
        return answer({"created": int(time.time()), "data": [{"b64_json": encoded}], **head})
    kind = "image_edit" if request.url.path.endswith("edits") else "image_generation"
    completed = {"type": f"{kind}.completed", "b64_json": encoded, "created_at": int(time.time())}

    async def events() -> AsyncIterator[bytes]:
        yield sse(completed | head, f"{kind}.completed")

    return stream(events())


def form_fields(request: Request, raw: bytes) -> Json | None:
    """The fields of a multipart form, files left out; None for any other body."""
    content_type = request.headers.get("content-type", "")
    if not content_type.startswith("multipart/form-data"):
        return None
    form = BytesParser().parsebytes(f"content-type: {content_type}\r\n\r\n".encode() + raw)
    return {
        str(part.get_param("name", header="content-disposition")): str(part.get_payload()).strip()
        for part in form.walk()
        if part.get_content_disposition() == "form-data" and not part.get_filename()
    }


MODELS = [
    {"id": name, "object": "model", "created": 1764547200, "owned_by": "redbtc"}
    for name in ("redbtc-demo", "redbtc-demo-image")
]


async def models(_: Request) -> Response:
    """GET /v1/models"""
    return answer({"object": "list", "data": MODELS})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}"""
    found = [model for model in MODELS if model["id"] == request.path_params["id"]]
    return answer(found[0]) if found else error("The model does not exist.", "model")


def app() -> Starlette:
    """The ASGI app."""
    return Starlette(
        routes=[
            Route("/v1/chat/completions", needs_model(chat), methods=["POST"]),
            Route("/v1/responses", needs_model(responses), methods=["POST"]),
            Route("/v1/images/generations", images, methods=["POST"]),
            Route("/v1/images/edits", images, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", model),
        ]
    )
