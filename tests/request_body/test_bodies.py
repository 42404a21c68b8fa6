"""Bodies that are compressed or large, models, and keys that are limited to some."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import random
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redbtc import request_body
from redbtc.rates import EXTRAS
from redbtc.refusals import Refusal
from redbtc.request_body.body import RequestBody
from redbtc.request_body.contents import BodyRules
from redbtc.request_body.forms import Form
from redbtc.request_body.media import decompressed
from redbtc.request_body.strict_json import read_members
from redbtc.steps import result_of
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.speed import cost
from tests.helpers.upstream import (
    IMAGE_USAGE,
    Received,
    Reply,
    Upstream,
    images_json,
    images_stream,
    json_answer,
    openai_like,
    response_object,
)
from tests.request_body.packers import PACKERS

pytestmark = pytest.mark.promise_1

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BODY = {"model": "gpt-up", "input": "Hi " * 200}
JSON = {"content-type": "application/json"}


def code(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["code"])


@pytest.mark.parametrize("encoding", PACKERS)
def test_a_compressed_body_goes_on_as_it_is(
    gateway: Gateway, upstream: Upstream, key: str, encoding: str
) -> None:
    packed = PACKERS[encoding](json.dumps(BODY).encode())
    with gateway.client(key) as client:
        headers = {**JSON, "content-encoding": encoding}
        upstream.script = json_answer(response_object())
        answer = client.post("/responses", content=packed, headers=headers)
        assert answer.status_code == 200, answer.text
        received = upstream.requests[-1]
        assert received.body == packed
        assert received.header("content-encoding") == encoding
        assert gateway.rows()[-1]["requested_model"] == "gpt-up"
        seen = len(upstream.requests)
        theirs = PACKERS[encoding](json.dumps({**BODY, "file_id": "file-1"}).encode())
        refused = client.post("/responses", content=theirs, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file_id")
        for broken in (packed[:-3], packed + b"x", b"x" + packed, b""):
            answer = client.post("/responses", content=broken, headers=headers)
            assert answer.status_code == 400, broken
    assert len(upstream.requests) == seen


@pytest.mark.parametrize("twice", ["include_usage", "Include_Usage", "include\\u005fusage"])
def test_options_of_a_stream_are_given_once(
    gateway: Gateway, upstream: Upstream, key: str, twice: str
) -> None:
    """Else the upstream could believe the other one, and report no usage."""
    options = b'{"include_usage":true,"%b":false}' % twice.encode()
    body = b'{"model":"m","messages":[],"stream":true,"stream_options":%b}' % options
    with gateway.client(key) as client:
        answer = client.post("/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert not upstream.requests


@pytest.mark.parametrize("encoding", PACKERS)
def test_a_bomb_costs_no_more_than_its_bound(
    make_gateway: MakeGateway, upstream: Upstream, encoding: str
) -> None:
    gateway = make_gateway("[server]\nmax_body_bytes = 20000000").start()
    key = gateway.new_key()
    bomb = PACKERS[encoding](b'{"model":"m","input":"' + b"a" * (1 << 30))
    before = gateway.rss()
    with gateway.client(key) as client:
        for _ in range(3):
            answer = client.post(
                "/responses", content=bomb, headers={**JSON, "content-encoding": encoding}
            )
            assert (answer.status_code, code(answer)) == (413, "request_too_large")
    assert psutil.Process(gateway.pid).memory_info().rss - before < 80 << 20
    assert not upstream.requests


@pytest.mark.parametrize("encoding", PACKERS)
def test_compression_of_any_kind(encoding: str) -> None:
    whole = random.Random(1).randbytes(300_000)
    two = PACKERS[encoding](whole) + PACKERS[encoding](b"more")
    assert result_of(decompressed(two, encoding, 1 << 20)) == whole + b"more"
    for bad in (two[:-1], b"", PACKERS[encoding](b"") * 1000):
        with pytest.raises(Refusal):
            result_of(decompressed(bad, encoding, 1 << 20))
    with pytest.raises(Refusal) as large:
        result_of(decompressed(PACKERS[encoding](bytes(1001)), encoding, 1000))
    assert large.value.code == "request_too_large"
    if encoding == "zstd":
        wide: dict[int, int] = {zstd.CompressionParameter.window_log: 27}
        with pytest.raises(Refusal):
            result_of(decompressed(zstd.compress(whole * 50, options=wide), "zstd", 1 << 30))
    else:
        assert result_of(decompressed(gzip.compress(whole), "gzip", 1 << 20)) == whole
        with pytest.raises(Refusal):
            result_of(decompressed(zlib.compress(whole), "gzip", 1 << 20))


def test_a_compressed_chat_stream_is_not_changed(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway().start()
    key = gateway.new_key()

    async def script(request: Received, reply: Reply) -> None:
        body = json.loads(gzip.decompress(request.body))
        assert "stream_options" not in body
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b'data: {"choices":[{"delta":{"content":"Hello"}}]}\n\n')
        await reply.send(b"data: [DONE]\n\n")
        await reply.end()

    upstream.script = script
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "stream": True}
    with gateway.client(key) as client:
        answer = client.post(
            "/chat/completions",
            content=gzip.compress(json.dumps(body).encode()),
            headers={**JSON, "content-encoding": "gzip"},
        )
        assert answer.text.endswith("[DONE]\n\n")
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "estimated")
    assert row["input_tokens"] >= 100, "of the decoded body"


def multipart(parts: list[tuple[str, bytes]], boundary: bytes = b"xyz") -> Iterator[bytes]:
    for head, value in parts:
        yield b"--" + boundary + b"\r\nContent-Disposition: form-data; " + head.encode()
        yield b"\r\n\r\n"
        for at in range(0, len(value), 1 << 20):
            yield value[at : at + (1 << 20)]
        yield b"\r\n"
    yield b"--" + boundary + b"--\r\n"


def test_sixteen_large_files_are_held_once(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("[server]\nmax_body_bytes = 900000000").start()
    key = gateway.new_key()
    size, received = 50 << 20, 0
    file = random.Random(3).randbytes(1 << 20) * 50
    parts = [('name="image[]"; filename="a.png"', file)] * 16
    parts += [('name="model"', b"gpt-image-2"), ('name="stream"', b"true")]
    whole = sum(len(piece) for piece in multipart(parts))
    peak, done, sent = 0, threading.Event(), zlib.crc32(b"")
    for piece in multipart(parts):
        sent = zlib.crc32(piece, sent)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, gateway.rss())

    async def script(request: Received, reply: Reply) -> None:
        nonlocal received
        received = zlib.crc32(request.body)
        request.body = b'name="stream"\r\n\r\ntrue'
        await images_stream()(request, reply)

    upstream.script = script
    before = gateway.rss()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with gateway.client(key, timeout=1800) as client:
            headers = {"content-type": "multipart/form-data; boundary=xyz"}
            headers["content-length"] = str(whole)
            answer = client.post("/images/edits", content=multipart(parts), headers=headers)
        assert answer.status_code == 200, answer.text
    finally:
        done.set()
        watcher.join()
    assert received == sent, "byte for byte"
    row = gateway.row()
    assert row["requested_model"] == "gpt-image-2"
    assert (row["input_tokens"], row["image_output_tokens"]) == (50, 272)
    assert peak - before < 16 * size * 1.25, (peak - before) / (16 * size)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_form_reads_the_same_however_it_arrives(data: st.DataObject) -> None:
    values = st.binary(max_size=40)
    names = data.draw(st.lists(st.sampled_from(["a", "b", "prompt", "image[]"]), max_size=5))
    parts = [(f'name="{name}"', data.draw(values)) for name in names]
    parts.insert(0, ('name="model"', b"gpt"))
    parts.append(('name="f"; filename="x"', b'\r\n--xy\r\nname="model"\r\n\r\nother'))
    whole = b"".join(multipart(parts))
    form, body = Form(b"xyz"), bytearray()
    at = 0
    while at < len(whole):
        step = data.draw(st.integers(1, 30))
        body += whole[at : at + step]
        result_of(form.grow(body))
        at += step
    once = Form(b"xyz")
    result_of(once.grow(whole))
    assert form.fields == once.fields == {name.split('"')[1].encode(): v for name, v in parts[:-1]}
    assert form.names == once.names
    assert form.max_tokens(body) == once.max_tokens(whole)
    assert form.facts(body).model == "gpt"


FORM = {"content-type": "multipart/form-data; boundary=xyz"}
FIELD = b"--xyz\r\nContent-Disposition: form-data; %b\r\n\r\na\r\n"


@pytest.mark.parametrize(
    "body",
    [
        FIELD % b'name="model"' * 2 + b"--xyz--",
        FIELD % b'name="model"; filename="x"' + b"--xyz--",
        FIELD % b'name="model"' + b"--xyz--b",
        FIELD % b'name="model"' + b"--xyz----\r\n",
        FIELD % b'name="model"' + b"--xyz--\r\n" + FIELD % b'name="mask[file_id]"' + b"--xyz--",
        FIELD % b'foo="; name=x"; name="image[file_id]"' + b"--xyz--",
        FIELD % b'name="a"; name="image[file_id]"' + b"--xyz--",
        FIELD % b'name="a\\"; x="; name="image[file_id]"' + b"--xyz--",
        FIELD % b"name=\"a\"; name*=utf-8''file_id" + b"--xyz--",
        FIELD % b'name="a"\r\n ; name="file_id"' + b"--xyz--",
        FIELD % b'name="a"\r\nContent-Disposition: form-data; name="file_id"' + b"--xyz--",
        FIELD % b'name="a"\nContent-Disposition: form-data; name="file_id"' + b"--xyz--",
        FIELD % b'name="model"\r\nContent-Transfer-Encoding: quoted-printable' + b"--xyz--",
        FIELD % b"" + b"--xyz--",
        FIELD.replace(b"\r\n", b"\n") % b'name="file_id"' + b"--xyz--",
        b"--xyz \n" + FIELD[5:] % b'name="file_id"' + b"--xyz--",
        b"--xyzz" + FIELD[5:] % b'name="file_id"' + b"--xyz--",
        FIELD % b'name="a"' + b"text\n--xyz\nname: file_id\n\n--xyz--",
        FIELD % b'name="a"' + b"\r\n--xyz",
        FIELD % b'name="a"',
        b"",
        b"no form",
        b'{"model":"m","images":[{"file_id":"f"}]}\r\n' + FIELD % b'name="a"' + b"--xyz--",
        FIELD.replace(b"a\r\n", b'[{"file_id":"f"}]\r\n') % b'name="images"' + b"--xyz--",
        FIELD % b'name="model"' + b"\r\n" + b"m" * 5000 + b"\r\n--xyz--",
        FIELD % b'name="model"' + FIELD % b'name="Model"' + b"--xyz--",
        FIELD % b'name="svg"' + b"--xyz--",
        FIELD % b'name="svg.model"' + b"--xyz--",
        FIELD % b'name="svg[model]"' * 2 + b"--xyz--",
        FIELD % b'name="mask[file\\_id]"' + b"--xyz--",
        FIELD % (b'name="' + b"a" * 300 + b'"') + b"--xyz--",
        FIELD.replace(b"a\r\n", b'[{"file_id":"f"}' + b" " * 5000 + b"]\r\n") % b'name="x"'
        + b"--xyz--",
        FIELD.replace(b"a\r\n", b'[{"file\\u005fid":"f"}]\r\n') % b'name="x"' + b"--xyz--",
        FIELD % b'name="a"' * 1001 + b"--xyz--",
    ],
)
def test_a_form_that_could_be_read_in_two_ways_is_refused(
    gateway: Gateway, upstream: Upstream, key: str, body: bytes
) -> None:
    with gateway.client(key) as client:
        answer = client.post("/images/edits", content=body, headers=FORM)
    assert (answer.status_code, code(answer)) == (400, "invalid_request"), body
    assert not upstream.requests


@pytest.mark.parametrize(
    "body",
    [
        FIELD % b"name=model; filename*=utf-8''x" + b"--xyz--",
        FIELD % b'name="a"; filename="; name=file_id \\x"' + b"--xyz--\r\nthe end",
        b"\r\n" + FIELD % b'filename=x;name="a" ; ' + b"--xyz--",
        FIELD % b'name="a"\r\nContent-Type: text/plain\r\nX-Y:' + b"--xyz--\r\n",
        FIELD.replace(b"xyz", b"xyz \t") % b"name=a" + b"--xyz--",
        FIELD.replace(b"a\r\n", b'"file_id": "f"\r\n') % b'name="prompt"' + b"--xyz--",
    ],
)
def test_a_form_with_one_meaning_passes(
    gateway: Gateway, upstream: Upstream, key: str, body: bytes
) -> None:
    body = body.replace(b"name=model", b"name=a")
    with gateway.client(key) as client:
        upstream.script = images_json()
        answer = client.post("/images/edits", content=body, headers=FORM)
    assert answer.status_code == 200, answer.text
    assert upstream.requests[-1].body == body


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=UTF-8", 200),
        ('Application/JSON ;charset="utf-8";x=y', 200),
        ("application/vnd.api+json", 200),
        ("application/json; charset=utf-7", 415),
        ("application/json; charset=utf-8; charset=utf-16", 415),
        ("multipart/form-data; boundary=a; boundary=xyz", 415),
        ("multipart/form-data; boundary*=utf-8''xyz; boundary=xyz", 415),
        ('multipart/form-data; x="; boundary=xyz', 415),
        ("multipart/form-data", 415),
        ('multipart/form-data; boundary="xyz "', 415),
        ('multipart/form-data; boundary="x\\yz"', 415),
        ("text/plain", 415),
        ("application/json," + " " * 50_000 + "x", 415),
    ],
)
def test_content_types(
    gateway: Gateway, upstream: Upstream, key: str, content_type: str, status: int
) -> None:
    upstream.script = images_json()
    with gateway.client(key) as client:
        headers = {"content-type": content_type}
        answer = client.post("/images/edits", content=b'{"prompt":"x"}', headers=headers)
    assert answer.status_code == status
    assert len(upstream.requests) == (status == 200)


@pytest.mark.parametrize("name", ["content-type", "content-encoding", "authorization"])
def test_headers_that_decide_stand_once(
    gateway: Gateway, upstream: Upstream, key: str, name: str
) -> None:
    body = json.dumps(BODY).encode()
    usual = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    lines = [*usual.items(), (name, usual.get(name, "identity")), ("content-encoding", "identity")]
    with gateway.client(key) as client:
        del client.headers["authorization"]
        answer = client.post("/responses", content=body, headers=lines)
    assert (answer.status_code, code(answer)) == (400, "invalid_http")
    assert not upstream.requests


# Members


NAMES = st.text(max_size=3) | st.sampled_from(["model", "input", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
SPACES = st.text(" \n\r\t", max_size=3)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.data(), st.booleans(), st.booleans())
def test_a_member_stands_in_a_body_once(data: st.DataObject, wide: bool, ascii_only: bool) -> None:
    """However it is written; and what stands there twice is found, wherever."""
    members = data.draw(st.dictionaries(NAMES, VALUES, max_size=6))
    space = SPACES if wide else st.just("")

    def written(name: str, value: Any) -> str:
        parts = [json.dumps(each, ensure_ascii=ascii_only) for each in (name, value)]
        return data.draw(space).join(["", parts[0], ":", parts[1], ""])

    def body(texts: list[str]) -> bytes:
        text = data.draw(space) + "{" + ",".join(texts) + "}" + data.draw(space)
        return text.encode()

    texts = [written(*member) for member in members.items()]
    assert read_members(body(texts)).keys() == members.keys()
    if members:
        again = data.draw(st.sampled_from(sorted(members)))
        value = data.draw(st.just(members[again]) | VALUES)
        texts.insert(data.draw(st.integers(0, len(texts))), written(again, value))
        with pytest.raises(Refusal):
            read_members(body(texts))


@pytest.mark.parametrize(
    "text",
    [
        '{"model":"a","model":"b","input":"x"}',
        '{"model":"a","input":"x","model":"a"}',
        '{"model":"b", "mod\\u0065l":"a","input":"x"}',
        '{"model":"a","input":[{"id":"msg_1"}],"input":"x"}',
        '{"model":"a","Model":"b","input":"x"}',
        '{"model":"a","input":"x","INPUT":[{"id":"msg_1"}]}',
        '{"model":"a","input":"x","stream":12,"stream":1}',
        '{"model":"a","input":"x","tools":[{"type":"image_generation","model":"a","model":"b"}]}',
        '{"model":"a","input":"x","tools":[{"type":"image_generation","Model":"b"}]}',
        '{"model":"a","input":"x","tools":[{"Type":"image_generation","model":"b"}]}',
        '{"model":"a","input":"x","SVG":{"model":"b"}}',
        '{"model":"a","input":"x","svg":{"Model":"b"}}',
        '{"model":"a","input":"x","svg":{"model":"a","model":"b"}}',
        '{"model":"a","input":[{"type":"additional_tools","Tools":[]}]}',
        '{"model":"a","input":"x",' + ",".join(f'"{n}": 1' for n in range(1001)) + "}",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_body_that_could_be_read_in_two_ways_is_refused(
    gateway: Gateway, upstream: Upstream, key: str, text: str, packed: bool
) -> None:
    body, headers = text.encode(), dict(JSON)
    if packed:
        body, headers = gzip.compress(body), {**JSON, "content-encoding": "gzip"}
    with gateway.client(key) as client:
        answer = client.post("/responses", content=body, headers=headers)
    assert (answer.status_code, code(answer)) == (400, "invalid_request"), answer.text
    assert not upstream.requests


def test_a_chat_with_half_a_character_is_metered(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """As JavaScript cuts texts; every byte but the option's goes on as it was."""
    gateway = make_gateway().start()
    body = b'{"model":"m","messages":[{"role":"user","content":"\\ud83d"}],"stream":true}'
    with gateway.client(gateway.new_key()) as client:
        assert client.post("/chat/completions", content=body, headers=JSON).status_code == 200
    option = b'"stream_options":{"include_usage":true},'
    assert upstream.requests[-1].body == body[:1] + option + body[1:]
    assert gateway.row()["usage_source"] == "upstream"


def test_nothing_in_a_body_takes_long() -> None:
    bodies = [
        b'{"model":"m","input":"x","tools":'
        + b'[{"type":"namespace","tools":' * 7
        + b"["
        + b'{"type":"x"},' * 100_000
        + b"{}]"
        + b"}]" * 7
        + b"}",
        b'{"model":"m","input":[' + b'{"id":0},' * 100_000 + b"{}]}",
        b'{"model":"m","input":[' + b'{"type":"message","id":"msg_1"},' * 50_000 + b"{}]}",
        b'{"model":"m","input":"x","container":['
        + b'{"container":[' * 300
        + b"0"
        + b"]}" * 300
        + b"]}",
        b'{"model":"m","input":"' + b"\\u0041" * 300_000 + b'"}',
        b'{"model":"m","input":[' + b'"\\u0041",' * 100_000 + b'""],"input":1}',
    ]

    def read(body: bytes) -> None:
        with contextlib.suppress(Refusal):
            result_of(RequestBody.read_body(body, body, rules=BodyRules())).further_models()

    def read_form(body: bytes) -> None:
        form = Form(b"xyz")
        result_of(form.grow(body))
        result_of(form.references())

    for body in bodies:
        assert cost(functools.partial(read, body)) < 70 + len(body) / 700, body[:60]
    part = FIELD % (b'name="' + b"a" * 200 + b'"')
    assert cost(lambda: read_form(part * 900 + b"--xyz--")) < 430


def test_svg_and_tool_usage_are_billed_by_their_own_models(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway('[billing]\nunpriced_models = "free"').start()
    for model, into, out in (("gpt-image", "10", "100"), ("gpt-svg", "1", "2")):
        gateway.cli("price", "add", model, "--input", into, "--output", out)
    gateway.cli("price", "add", "gpt-up", "--input", "1", "--output", "1", "--web-search", "0.5")
    svg = {"model": "gpt-svg", "input_tokens": 100, "output_tokens": 50, "reasoning_tokens": 20}
    content = {"created": 1, "data": [], "usage": IMAGE_USAGE, "svg_usage": svg}
    upstream.script = json_answer(content)
    tools: dict[str, Any] = {
        "image_gen": {
            "input_tokens": 50,
            "input_tokens_details": {"image_tokens": 40, "text_tokens": 10},
            "output_tokens": 1000,
        },
        "web_search": {"num_requests": 3},
    }
    with gateway.client(gateway.new_key()) as client:
        client.post("/images/generations", json={"model": "gpt-image", "prompt": "x"})
        drawing = {"type": "image_generation_call", "id": "ig_1", "svg_usage": svg}
        tool = {"type": "image_generation", "model": "gpt-image"}
        for output in ([], [drawing, {**drawing, "id": "ig_2"}]):
            upstream.script = json_answer(response_object(tool_usage=tools, output=output))
            client.post("/responses", json={**BODY, "tools": [tool]})
    drawn, answered, wrote = gateway.rows()
    assert (drawn["input_tokens"], drawn["output_tokens"]) == (150, 322)
    assert drawn["reasoning_tokens"] == 20
    assert float(drawn["cost"]) * 1e6 == pytest.approx(50 * 10 + 272 * 100 + 100 * 1 + 50 * 2)
    assert (answered["input_tokens"], answered["web_searches"]) == (30, 3)
    assert (answered["image_input_tokens"], answered["image_output_tokens"]) == (40, 1000)
    assert answered["tool_input_tokens"] == 10
    expected = 30 + 9 + 50 * 10 + 1000 * 100 + 3 * 0.5e6
    assert float(answered["cost"]) * 1e6 == pytest.approx(expected)
    assert float(wrote["cost"]) * 1e6 == pytest.approx(expected + 2 * (100 * 1 + 50 * 2))
    assert (wrote["input_tokens"], wrote["output_tokens"]) == (30 + 200, 9 + 100)
    assert wrote["reasoning_tokens"] == answered["reasoning_tokens"] + 2 * 20
    sums = gateway.cli("usage", "--group-by", "model")
    assert sums["totals"]["tool_input_tokens"] == 20
    assert gateway.cli("db", "check")["ok"]


def test_images_are_metered_in_every_form(gateway: Gateway, upstream: Upstream, key: str) -> None:
    with gateway.client(key) as client:
        for path in ("generations", "edits"):
            upstream.script = images_json()
            client.post(f"/images/{path}", json={"prompt": "x", "model": "m"})
            upstream.script = images_stream(3)
            streamed = client.post(f"/images/{path}", json={"prompt": "x", "stream": True})
            assert streamed.text.count("partial_image_index") == 3
    assert [row["image_output_tokens"] for row in gateway.rows()] == [272] * 4
    assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 4


# Models


def test_models_of_several_upstreams_are_joined_and_remembered(
    make_gateway: MakeGateway,
) -> None:
    with Upstream() as one, Upstream() as two:
        down = json_answer({"error": {"message": "down"}}, 503)
        one.script = json_answer({"data": [{"id": "a-1"}, {"id": "b-1"}, {"id": "both", "x": 1}]})
        two.script = json_answer({"data": [{"id": "b-2"}, {"id": "a-2"}, {"id": "both", "x": 2}]})
        upstreams = [
            {"name": name, "base_url": up.url, "api_key_env": "", "models": models}
            for name, up, models in (("one", one, ["a-*", "both"]), ("two", two, ["b-*", "both"]))
        ]
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        limited = gateway.cli("key", "add", "--help", check=False)
        assert "--models" in limited.stdout
        with gateway.client(gateway.new_key()) as client:
            answer = client.get("/models")
            found = [(model["id"], model.get("x")) for model in answer.json()["data"]]
            assert found == [("a-1", None), ("both", 1), ("b-2", None)]
            assert "age" not in answer.headers
            two.script = down
            time_passes()
            answer = client.get("/models")
            assert [model["id"] for model in answer.json()["data"]] == ["a-1", "both", "b-2"]
            assert int(answer.headers["age"]) >= 1
            one.script = down
            time_passes()
            shown = client.get("/models/a-1")
            assert (shown.status_code, shown.json()) == (200, {"id": "a-1"})
            assert int(shown.headers["age"]) >= 1
            assert client.get("/models/a-9").status_code == 502
            one.script = json_answer({"error": {"message": "none"}}, 404)
            assert client.get("/models/a-1").status_code == 404, "it says so itself"


def test_no_description_of_a_model_fills_the_memory(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """An upstream that went on for half a minute took gigabytes."""

    async def script(request: Received, reply: Reply) -> None:
        if request.path == "/v1/models":
            await openai_like(request, reply)
            return
        await reply.head(200, [("content-type", "application/json")])
        while not request.closed.is_set() and len(sent) < 200:
            sent.append(1)
            await reply.send(b"x" * 1_000_000)
        await reply.end()

    sent: list[int] = []
    upstream.script = script
    with gateway.client(key) as client:
        assert client.get("/models/gpt-up").json() == {"id": "gpt-up", "object": "model"}
    assert len(sent) < 50


def time_passes() -> None:
    threading.Event().wait(1.1)


def test_a_picture_may_have_a_background(gateway: Gateway, upstream: Upstream, key: str) -> None:
    """Which in a response is another thing."""
    upstream.script = images_json()
    with gateway.client(key) as client:
        for path in ("generations", "edits"):
            body = {"model": "m", "prompt": "x", "background": "transparent"}
            assert client.post(f"/images/{path}", json=body).status_code == 200


DRAW = {"type": "image_generation", "model": "gpt-image-dear"}
FURTHER: list[tuple[str, Any]] = [
    ("/responses", {"tools": [DRAW]}),
    ("/responses", {"tools": [{"type": "image_generation"}]}),
    ("/responses", {"tools": [{"type": "namespace", "tools": [DRAW]}]}),
    ("/responses", {"input": [{"type": "additional_tools", "tools": [DRAW]}]}),
    ("/responses", {"tools": [{"tools": [{"tools": [DRAW]}]}]}),
    ("/responses", {"tools": [{**DRAW, "model": "gpt-up", "svg": {"model": "gpt-dear"}}]}),
    ("/images/generations", {"svg": {"model": "gpt-dear"}}),
]


@pytest.mark.parametrize(("path", "more"), FURTHER)
def test_models_that_a_body_makes_work_are_models_too(
    make_gateway: MakeGateway, upstream: Upstream, path: str, more: Any
) -> None:
    """For a key limited to models, and where what has no price is refused."""
    gateway = make_gateway('[billing]\nunpriced_models = "refuse"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1", "--output", "1")
    gateway.new_key()
    limited = gateway.cli("key", "add", "test", "--models", "gpt-up")["key"]
    with gateway.client(limited) as client, gateway.client(gateway.new_key()) as free:
        body = {"model": "gpt-up", "input": "x", **more}
        answer = client.post(path, json=body)
        assert (answer.status_code, code(answer)) == (403, "model_not_allowed")
        answer = free.post(path, json=body)
        assert (answer.status_code, code(answer)) == (404, "model_not_found")
        gateway.cli("price", "add", "gpt-*", "--input", "1", "--output", "1")
        upstream.script = json_answer(response_object())
        assert free.post(path, json=body).status_code == 200
        two = {**body, "tools": [DRAW, {"type": "image_generation", "model": "gpt-up"}]}
        assert free.post("/responses", json=two).status_code == 400
    if "/images" in path:
        form = b"".join(
            multipart([('name="svg[model]"', b"gpt-dear"), ('name="model"', b"gpt-up")])
        )
        with gateway.client(limited) as client:
            assert client.post("/images/edits", content=form, headers=FORM).status_code == 403


def test_what_a_tool_can_cost_is_held(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway('[billing]\ndefault_credit_limit = "0"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1", "--output", "1")
    gateway.cli("price", "add", "gpt-image*", "--input", "1", "--output", "1000000")
    key = gateway.new_key()
    gateway.cli("payment", "add", "test", "10")
    upstream.script = json_answer(response_object())
    with gateway.client(key) as client:
        body = {**BODY, "max_output_tokens": 10}
        assert client.post("/responses", json=body).status_code == 200
        answer = client.post("/responses", json={**body, "tools": [DRAW]})
    assert (answer.status_code, code(answer)) == (429, "insufficient_quota")


def test_a_key_limited_to_models(gateway: Gateway, upstream: Upstream, key: str) -> None:
    added = gateway.cli("key", "add", "test", "--models", "gpt-up, codex*")
    assert added["models"] == ["gpt-up", "codex*"]
    assert gateway.cli("key", "rotate", added["id"])["models"] == ["gpt-up", "codex*"]
    with gateway.client(added["key"]) as client:
        assert client.post("/responses", json={**BODY, "model": "codex-9"}).status_code == 200
        seen = len(upstream.requests)
        for path, body in (
            ("/responses", {**BODY, "model": "gpt-other"}),
            ("/responses/compact", {**BODY, "model": "gpt-other"}),
            ("/images/generations", {"prompt": "the usual model"}),
            ("/chat/completions", {"model": "GPT-UP", "messages": []}),
        ):
            answer = client.post(path, json=body)
            assert (answer.status_code, code(answer)) == (403, "model_not_allowed"), path
        assert len(upstream.requests) == seen
        assert [model["id"] for model in client.get("/models").json()["data"]] == ["gpt-up"]
        assert client.get("/models/gpt-other").status_code == 404
        assert client.get("/models/gpt-up").status_code == 200
    with gateway.client(key) as client:
        assert len(client.get("/models").json()["data"]) == 2
    bad = gateway.cli("key", "add", "test", "--models", "a,,b", check=False)
    assert bad.returncode == 1
    assert "pattern" in bad.stderr


EXAMPLE = re.search(r"\n\n( +\{.*?\}\})\n\n", request_body.__doc__ or "", re.DOTALL)


def test_the_documented_example_is_read_as_described() -> None:
    assert EXAMPLE
    text = EXAMPLE[1].encode()
    body = result_of(RequestBody.read_body(text, text, None, BodyRules()))
    assert (body.facts.model, body.facts.stream) == ("gpt-5.5", True)
    assert sorted(each.id for each in body.references) == ["resp_1", "rs_3", "vs_4", "ws_2"]
    assert body.chosen_ids == {"msg_a"}
    assert (body.extras, body.offers_tools) == (EXTRAS["file_search"], True)


@pytest.mark.parametrize(
    ("of", "to", "error"),
    [
        ('"stream"', '"model"', "Duplicate key in the JSON body."),
        ('"model"', '"Model"', "The key 'Model' must be written 'model'."),
        (
            "previous_response_id",
            "previous_respons\\u0065_id",
            "The name 'previous_response_id' contains escapes or look-alike characters. "
            "Write it in plain ASCII.",
        ),
    ],
)
def test_variants_of_the_documented_example_are_refused(of: str, to: str, error: str) -> None:
    assert EXAMPLE
    assert error in " ".join((request_body.__doc__ or "").split())
    text = EXAMPLE[1].replace(of, to).encode()
    with pytest.raises(Refusal) as refusal:
        result_of(RequestBody.read_body(text, text, None, BodyRules()))
    assert refusal.value.message == error


def test_a_conversation_outside_of_metadata_is_a_reference() -> None:
    assert EXAMPLE
    text = EXAMPLE[1].replace('"metadata"', '"x"').encode()
    body = result_of(RequestBody.read_body(text, text, None, BodyRules()))
    assert "conv_5" in {each.id for each in body.references}
