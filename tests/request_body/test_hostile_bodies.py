"""No body, whatever it contains, holds the loop for long or costs more than 100 times its bytes."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import random
import sqlite3
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from redbtc.refusals import Refusal
from redbtc.request_body import cutting, facts, forms, strict_json
from redbtc.request_body import pieces as pieces_module
from redbtc.request_body.body import ClientEvent, RequestBody
from redbtc.request_body.cutting import Cutter
from redbtc.request_body.forms import Form
from redbtc.request_body.media import decompressed
from redbtc.request_body.pieces import MAX_PIECE
from redbtc.steps import result_of
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.speed import Stalls, longest_step, unit
from tests.helpers.upstream import Upstream, json_answer, response_object, silent
from tests.request_body.packers import PACKERS

pytestmark = pytest.mark.promise_9

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MOST_UNITS = 30  # 20 ms on an ordinary machine
MOST_MEMORY = 100  # times the body


def body(**members: bytes) -> bytes:
    """Return a body with these members, each given as JSON text."""
    more = b"".join(b',"%b":%b' % (name.encode(), value) for name, value in members.items())
    return b'{"model":"m"%b}' % more


def times(element: bytes, size: int) -> bytes:
    """Return a list of as many elements as fit."""
    return b"[" + element * (size // len(element)) + b"0]"


def items(element: bytes) -> Callable[[int], bytes]:
    return lambda size: body(input=times(element, size)[:-2].removesuffix(b",") + b"]")


def tools(element: bytes) -> Callable[[int], bytes]:
    return lambda size: body(
        input=b'"x"', tools=times(element, size)[:-2].removesuffix(b",") + b"]"
    )


def member(name: str, element: bytes) -> Callable[[int], bytes]:
    return lambda size: body(**{name: times(element, size)})


def wide(separator: bytes) -> Callable[[int], bytes]:
    def make(size: int) -> bytes:
        count = size // 12
        return b"{" + b",".join(b'"n%07d"%b1' % (n, separator) for n in range(count)) + b"}"

    return make


def nested(opening: bytes, inner: bytes, closing: bytes) -> Callable[[int], bytes]:
    def make(size: int) -> bytes:
        depth = min(size // len(opening + closing), 900)
        unit = opening * depth + inner + closing * depth + b","
        return member("x", unit)(size)

    return make


def in_item(value: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return lambda size: body(input=b'[{"id":"a","type":"x","file_id":"a","y":%b}]' % value(size))


CORPUS: dict[str, Callable[[int], bytes]] = {
    "numbers": member("x", b"1,"),
    "one number": lambda size: body(x=b"1" * size),
    "strings": member("x", b'"a",'),
    "one string": lambda size: body(x=b'"%b"' % (b"a" * size)),
    "one escaped string": lambda size: body(x=b'"%b"' % (b"\\u0041" * (size // 6))),
    "one string of half characters": lambda size: body(x=b'"%b"' % (b"\\ud83d" * (size // 6))),
    "half characters": member("x", b'"\\ud83d",'),
    "other letters": lambda size: body(x=b'"%b"' % ("ſ".encode() * (size // 2))),
    "strings in other letters": member("x", '"ſ",'.encode()),
    "escaped strings": member("x", b'"\\u0041",'),
    "invalid UTF-8": lambda size: body(x=b'"%b"' % (b"\xc3\xa9" * (size // 2) + b"\xff")),
    "literals": member("x", b"null,"),
    "lists": member("x", b"[],"),
    "objects": member("x", b"{},"),
    "pairs": member("x", b'{"":1},'),
    "space": lambda size: body(x=b" " * size + b"1"),
    "space before": lambda size: b" " * size + body(),
    "space after": lambda size: body() + b"\n" * size,
    "spaced numbers": member("x", b"1" + b" " * 1000 + b","),
    "commas": member("x", b","),
    "quotes": member("x", b'"'),
    "backslashes": lambda size: body(x=b'"%b' % (b"\\" * size)),
    "openings": lambda size: b"[" * size,
    "closings": lambda size: b"]" * size,
    "open objects": lambda size: b'{"a":' * (size // 5),
    "deep lists": nested(b"[", b"1", b"]"),
    "deep objects": nested(b'{"":', b"1", b"}"),
    "deep tools": nested(b'{"tools":[', b"", b"]}"),
    "nine levels": member("x", b"[" * 9 + b"]" * 9 + b","),
    "eight levels": member("x", b"[" * 8 + b"]" * 8 + b","),
    "open at every window": member("x", b'{"a":[{"a":[{"a":[' + b"1," * 900 + b"1]}]}]},"),
    "a wide body": wide(b":"),
    "a wide body with space": wide(b": "),
    "a wide item": in_item(wide(b":")),
    "a wide item with space": in_item(wide(b" :")),
    "wide items": items(b'{"id":"a",' + wide(b": ")(5_000)[1:] + b","),
    "a member twice": lambda size: b"{" + b'"a":1,' * (size // 6) + b'"a":1}',
    "long names": lambda size: b'{"%b":1,"%b":2}' % (b"a" * (size // 2), b"b" * (size // 2)),
    "items of nothing": items(b"{},"),
    "items of one kind": items(b'{"type":"x"},'),
    "items with ids": items(b'{"id":"a"},'),
    "items with spaced ids": items(b'{ "id":"a"},'),
    "items with numbers for ids": items(b'{"id":0},'),
    "approvals": items(
        b'{"type":"mcp_approval_response","approve":true,"approval_request_id":"x"},'
    ),
    "references": items(b'{"type":"item_reference","id":"msg_1"},'),
    "items that name files": items(b'{"file_id":"a"},'),
    "items that offer tools": items(b'{"tools":[{}]},'),
    "pictures": items(b'{"content":[{"image_url":"a"}]},'),
    "one item's pictures": in_item(lambda size: times(b'{"image_url":"a"},', size)),
    "a picture's address": items(b'{"content":[{"image_url":{"a":{"image_url":"a"}}}]},'),
    "messages": member("messages", b'{"content":[{"image_url":"a"}]},'),
    "tools of one kind": tools(b'{"type":"x"},'),
    "tools of nothing": tools(b"{},"),
    "tools for pictures": tools(b'{"type":"image_generation","model":"a"},'),
    "tools that name files": tools(b'{"file_id":"a"},'),
    "tools in tools": tools(b'{"tools":[{"tools":[{"tools":[{}]}]}]},'),
    "functions": member("functions", b'{"file_id":"a"},'),
    "schemas in schemas": lambda size: body(
        text=b'{"format":' * 200 + b'{"file_id":["' + b"a" * size + b'"]}' + b"}" * 200
    ),
    "files": member("file_ids", b'"a",'),
    "files in files": member("file_ids", b'{"file_ids":["a"]},'),
    "containers in containers": nested(b'{"container":[', b'"a"', b"]}"),
    "prompts in prompts": nested(b'{"prompt":{"id":"a","x":', b"1", b"}}"),
    "large prompts in prompts": lambda size: body(
        prompt=b'{"prompt":{"x":"%b","y":' % (b"a," * 5000) * (size // 10_000)
        + b"1"
        + b"}}" * (size // 10_000)
    ),
    "names that are not followed": member("x", b'"file_id" ' + b" " * 50 + b","),
    "one name and space": lambda size: body(x=b'{"file_id"' + b" " * size + b":1}"),
    "conversations": member("x", b'{"conversation":{"id":"a"}},'),
    "brackets after a name": lambda size: body(container=times(b"[],", size)),
    "no object": lambda size: times(b"1,", size),
    "zeros": lambda size: bytes(size),
}
SHORT, LONG = MAX_PIECE - 100, 1_500_000  # read in one piece, and in many


def run(steps: Iterator[None]) -> Iterator[None]:
    """Read a body, in steps, until it ends or is refused."""
    with contextlib.suppress(Refusal):
        yield from steps


def assert_quick(make: Callable[[], Iterator[None]]) -> None:
    """The least of some tries counts, since other processes disturb a measurement."""
    longest = longest_step(run(make()))
    if longest >= MOST_UNITS:
        longest = min(longest_step(run(make())) for _ in range(4))
    assert longest < MOST_UNITS, longest


def assert_small(make: Callable[[], Iterator[None]], size: int) -> None:
    """Assert that reading takes at most MOST_MEMORY times the body's size."""
    tracemalloc.start()
    for _ in run(make()):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_MEMORY * size, peak / size


def test_long_objects_in_a_list_are_read_in_steps() -> None:
    """A part of a list has room for the stand-ins of 700, and they were read in one step."""
    item = b'{"a":"%b","b":"%b"}' % ((b"\\n" + b"x" * 20_000,) * 2)
    text = body(input=b"[%b]" % b",".join([item] * 50))
    pieces = result_of(Cutter(text).steps())
    (part,) = pieces.parts(strict_json.read_members(pieces.root)["input"])
    assert len(part) < MAX_PIECE
    steps = sum(1 for _ in strict_json.read_list(pieces, part, set(), None))
    assert steps > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
def test_no_body_holds_the_loop_or_takes_memory(name: str) -> None:
    short, long = CORPUS[name](SHORT), CORPUS[name](LONG)
    assert_quick(lambda: RequestBody.read_body(short, short))
    assert_quick(lambda: ClientEvent.read_event(long))
    assert_small(lambda: RequestBody.read_body(short, short), len(short))
    middle = CORPUS[name](2 * MAX_PIECE)
    assert_small(lambda: RequestBody.read_body(middle, middle), len(middle))


def packed(encoding: str, text: bytes) -> tuple[bytes, str]:
    return PACKERS[encoding](text), encoding


COMPRESSED = {
    f"{encoding} of {name}": packed(encoding, text)
    for encoding in PACKERS
    for name, text in {
        "nothing": b"",
        "zeros": bytes(50_000_000),
        "approvals": CORPUS["approvals"](1 << 20),
        "noise": random.Random(1).randbytes(3_000_000),
        "tools": CORPUS["tools of one kind"](10_000_000),
    }.items()
} | {
    "gzip of empty blocks": (gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * 400_000, "gzip"),
    "many frames": (zstd.compress(b"a" * 5000) * 1000, "zstd"),
    "one frame and much more": (zstd.compress(b"a") + bytes(3_000_000), "zstd"),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_no_compressed_body_does(name: str) -> None:
    body, encoding = COMPRESSED[name]
    assert_quick(lambda: decompressed(body, encoding, 100 << 20))
    assert_small(lambda: decompressed(body, encoding, 100 << 20), max(len(body), 10_000))


def test_a_short_body_is_decoded_to_little() -> None:
    """188 bytes of zstd could once be decoded to 1 MB."""
    for size, fits in ((64 << 10, True), ((64 << 10) + 1, False)):
        body = zstd.compress(bytes(size))
        assert len(body) < 100
        if fits:
            assert len(result_of(decompressed(body, "zstd", 1 << 20))) == size
        else:
            with pytest.raises(Refusal, match="request_too_large"):
                result_of(decompressed(body, "zstd", 1 << 20))


PART = b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
DASHES = b"-" * 35 + b"x" + b"-" * 34
FORMS = {
    "parts": (b"xyz", PART % (b"xyz", b"a", b"") * 10_000),
    "parts of many names": (b"xyz", b"".join(PART % (b"xyz", b"%d" % n, b"1") for n in range(999))),
    "fields of names": (b"xyz", PART % (b"xyz", b"a", b'"file_id":"a",' * 290) * 900),
    "fields of escapes": (b"xyz", PART % (b"xyz", b"a", b'"\\u0041",' * 400) * 900),
    "boundaries": (b"a", b"--a\r\n" * 100_000),
    "almost boundaries": (DASHES, PART % (DASHES, b"a", b"-" * 3_000_000)),
    "a head without end": (b"xyz", b"--xyz\r\n" + b"a" * 3_000_000),
    "heads of parameters": (b"xyz", PART % (b"xyz", b'a"' + b'; a="b"' * 1000, b"") * 900),
}


@pytest.mark.parametrize("name", FORMS)
def test_no_form_does(name: str) -> None:
    boundary, text = FORMS[name]
    text += b"--%b--\r\n" % boundary

    def steps() -> Iterator[None]:
        form = Form(boundary)
        yield from form.grow(text)
        yield from RequestBody.read_body(text, text, form)

    assert_quick(steps)
    assert_small(steps, len(text))


@pytest.mark.slow
def test_bodies_that_are_mutated_to_cost_more() -> None:
    """Each round mutates the structure of the costliest bodies so far."""
    chance = random.Random(20)
    pool = [(0.0, make(70_000)) for make in CORPUS.values()]
    until = time.process_time() + 1500 * unit()
    while time.process_time() < until:
        _, chosen = pool[chance.randrange(len(pool))]
        text = mutated(chance, chosen)
        cost = longest_step(run(RequestBody.read_body(text, text)))
        if cost > MOST_UNITS:
            cost = min(longest_step(run(RequestBody.read_body(text, text))) for _ in range(3))
        assert cost < MOST_UNITS, text[:200]
        pool.append((cost, text))
        pool = sorted(pool, key=lambda each: each[0])[-200:]


# In pieces


def facts_of(text: bytes) -> object:
    """Return what is read of a body, or its refusal."""
    try:
        content = result_of(RequestBody.read_body(text, text))
        further = content.further_models()
    except Refusal:
        return "refused"
    changed = content.add_include_usage() and content.sent
    ids = {
        each.id.replace("😀", "\ufffd\ufffd") for each in content.references
    }  # half of one: both
    return content.facts, ids, further, changed, content.size


def honest(chance: random.Random) -> dict[str, Any]:
    """Return a body that may contain everything that is looked for."""

    def some(kind: Callable[[], Any], most: int = 4) -> list[Any]:
        return [kind() for _ in range(chance.randrange(most))]

    def value(depth: int = 3) -> Any:
        if depth == 0 or chance.random() < 0.4:
            return chance.choice(["", "é", "ſ", 'a"\\', "😀", 1.5, None, True, -12, "file-1"])
        if chance.random() < 0.5:
            return some(lambda: value(depth - 1))
        names = ("file_id", "prompt", "container", "id", "type", "x", "file_ids", "conversation")
        return {chance.choice(names): value(depth - 1) for _ in range(chance.randrange(4))}

    def item() -> dict[str, Any]:
        kind = chance.choice(["message", "reasoning", "function_call", "item_reference"])
        usual = {"type": kind, "id": f"msg_{chance.randrange(5)}", "content": value()}
        usual |= {"tools": some(tool)} if chance.random() < 0.2 else {}
        return {name: each for name, each in usual.items() if chance.random() < 0.8}

    def tool() -> dict[str, Any]:
        kind = chance.choice(["function", "image_generation"])
        inner = {"tools": some(tool, 2)} if chance.random() < 0.2 else {}
        return {"type": kind, "function": {"parameters": value(), "x": value()}, **inner}

    members: dict[str, Any] = {"model": "m", "stream_options": {"x": 1}, "x": value()}
    members |= {"input": some(item), "tools": some(tool), "metadata": value(), "text": value()}
    names = chance.sample(sorted(members), chance.randrange(len(members)))
    return {name: members[name] for name in names}


def test_a_body_in_pieces_reads_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds wherever the body is cut, for valid and invalid ones."""
    chance, refused = random.Random(1), 0
    for number in range(2500):
        indent = chance.choice((None, None, 1))
        text = json.dumps(honest(chance), indent=indent, ensure_ascii=number % 2 == 0)
        encoded = text.encode("utf-8")
        if number % 3 == 0:
            at, more = chance.randrange(len(encoded)), chance.choice(STRAY)
            encoded = encoded[:at] + more + encoded[at + chance.randrange(3) :]
        whole = facts_of(encoded)
        with monkeypatch.context() as small:
            small.setattr("redbtc.request_body.reading.MAX_PIECE", 1)
            small.setattr(cutting, "WINDOW", 120)
            for module in (pieces_module, cutting):
                small.setattr(module, "STRING_WINDOW", 7)
            assert facts_of(encoded) == whole, encoded
        refused += not isinstance(whole, tuple)
    assert 300 < refused < 1200


STRAY = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\ud83d",
    b" " * 99,
    b"\xff",
    b"\n",
    b"1",
]
STRAY += [b"\0", b"\x0b", b"null", b",,", b'"x":1,', b'"file_id":"q",', b"\\u0061", b"\xc3"]


def mutated(chance: random.Random, text: bytes) -> bytes:
    """Return a body in which a part is repeated, inserted or removed."""
    at, length = chance.randrange(len(text) or 1), chance.choice((1, 5, 30, 200))
    part = chance.choice((text[at : at + length], b'"file_ids":[', b"{", b"]", b'"', b"\\", b" "))
    repeated = part * chance.choice((0, 1, 50, 5000))
    return (text[:at] + repeated[:70_000] + text[at + chance.choice((0, length)) :])[:200_000]


# Through the front door

MOST_STALL = 150  # units: with the way to the gateway and back, and other processes between


def test_nobody_waits_for_a_hostile_body(gateway: Gateway, upstream: Upstream, key: str) -> None:
    upstream.script = json_answer(response_object())
    sent = [
        (zstd.compress(CORPUS["approvals"](1 << 20)), "zstd"),
        (zstd.compress(CORPUS["approvals"](60_000)), "zstd"),
        (zstd.compress(CORPUS["tools of one kind"](3_000_000)), "zstd"),
        (CORPUS["items with ids"](300_000), "identity"),
        (CORPUS["items that name files"](300_000), "identity"),
        (CORPUS["deep objects"](1_000_000), "identity"),
        (gzip.compress(bytes(50_000_000)), "gzip"),
    ]
    with gateway.client(key) as client, Stalls(gateway.port) as stalls:
        for body, encoding in sent:
            headers = {"content-type": "application/json", "content-encoding": encoding}
            assert client.post("/responses", content=body, headers=headers).status_code < 500
    assert stalls.longest < MOST_STALL


def test_many_small_bodies_at_once_take_little_memory(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Two hundred times 52 bytes took 570 MB: what each was read into waited for its next slice."""
    upstream.script = json_answer(response_object())
    body = zstd.compress(CORPUS["items with numbers for ids"](SHORT))
    head = (
        f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
        "content-type: application/json\r\ncontent-encoding: zstd\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    before = most = gateway.rss()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(gateway.connect()) for _ in range(200)]
        for sock in socks:
            sock.sendall(head.encode() + body[:-1])
        for sock in socks:
            sock.sendall(body[-1:])
        for sock in socks:
            sock.setblocking(False)
            answer = b""
            while not answer:
                most = max(most, gateway.rss())
                time.sleep(0.001)
                with contextlib.suppress(BlockingIOError):
                    answer = sock.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
    assert most - before < 150_000_000, most - before


def test_what_a_body_names_is_nothing_to_collect() -> None:
    """Collections of garbage took 300 ms while 60 requests with 20,000 references each waited."""
    text = body(input=b"[%b]" % b",".join(b'{"id":"a%d"}' % n for n in range(20_000)))
    gc.collect()
    before = len(gc.get_objects())
    content = result_of(RequestBody.read_body(text, text))
    assert len(content.references) == 20_000
    assert len(gc.get_objects()) - before < 1000


def test_what_a_body_names_takes_no_memory_while_it_waits(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway({"limits": {"queue_seconds": 600}}).start()
    key = gateway.new_key(concurrency=1)
    upstream.script = json_answer(response_object())
    with gateway.client(key) as client:
        assert client.post("/responses", json={"model": "m", "input": "x"}).status_code == 200
    names = [f"item_{number:06d}" for number in range(19_000)]
    with contextlib.closing(sqlite3.connect(gateway.database)) as database, database:
        database.executemany(
            """INSERT INTO stored_objects (id, account_id, upstream, created_at)
               SELECT ?, account_id, upstream, created_at FROM stored_objects LIMIT 1""",
            [(name,) for name in names],
        )
    upstream.script = silent
    asked = {"model": "m", "input": [{"id": name} for name in names]}
    size = len(json.dumps(asked))
    before = gateway.rss()
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(gateway.begin(key, asked))
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 29)
        assert gateway.rss() - before < 30 * 3 * size + 40_000_000


@pytest.mark.parametrize("size", [300, 32_000])
def test_long_ids_are_not_looked_up(gateway: Gateway, key: str, size: int) -> None:
    """A query for 250 of them took 30 ms. No id of more than 256 characters is ever learned."""
    items = [{"type": "item_reference", "id": f"{n:03d}" + "a" * size} for n in range(250)]
    with gateway.client(key) as client, Stalls(gateway.port) as stalls:
        for _ in range(3):
            answer = client.post("/responses", json={"model": "m", "input": items})
            assert answer.status_code == 400
            assert "item_reference" in answer.json()["error"]["message"]
    assert stalls.longest < MOST_UNITS


def test_a_history_with_everything_in_it_passes(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Two thousand items with pictures and ids, 500 tools with schemas, a schema of 4 MB."""
    upstream.script = json_answer(response_object())
    picture = "data:image/png;base64," + "iVBORw0KGgo/" * 60_000
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(20)}}
    wide = {f"p{n}": {"anyOf": [schema, {"type": "null"}]} for n in range(5000)}
    history: list[Any] = []
    for n in range(1000):
        shown = {"type": "input_image", "image_url": picture} if n % 50 == 0 else {}
        text = {"type": "input_text", "text": f"{n} words, “quoted” and\nmore " * 20}
        history.append({"type": "message", "role": "user", "content": [text, shown or text]})
        sealed = "gAAAAA" * 2000
        history.append({"type": "reasoning", "id": f"rs_{n}", "encrypted_content": sealed})
    tools = [{"type": "function", "name": f"f{n}", "parameters": schema} for n in range(500)]
    named = {"type": "object", "properties": {"file_id": {"const": "mine"}}}  # its author's words
    body = {
        "input": history,
        "tools": [*tools, {"type": "image_generation"}],
        "text": {"format": {"type": "json_schema", "schema": {"properties": wide, "x": named}}},
        "model": "gpt-up",
        "store": False,
    }
    sent = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(sent) > 30_000_000
    content = result_of(RequestBody.read_body(sent, sent))
    assert content.further_models() == {facts.DEFAULT_IMAGE_MODEL: True}
    assert content.chosen_ids == {f"rs_{n}" for n in range(1000)}
    assert not content.references
    pictures = (len(picture) + 2) * 20
    assert content.max_input_tokens == len(sent) - pictures + 20 * forms.MAX_PICTURE_TOKENS
    with gateway.client(key) as client:
        answer = client.post(
            "/responses", content=sent, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 200, answer.text
    assert upstream.requests[-1].body == sent
    assert gateway.row()["requested_model"] == "gpt-up"


def test_options_far_within_a_long_chat_are_found(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """`include_usage` is added to `stream_options`, and nothing else is changed."""
    before = (
        b'{"model":"m","messages":[%b{"x":{"stream_options":{"y":1}}}],"stream":true, "a":"%b",'
    )
    before %= b'{"content":"\\"stream_options\\":{"},' * 30_000, b"b" * 200_000
    body = before + b' "stream_options" : { "include_obfuscation":false}, "z":[1, 2]}'
    with gateway.client(key) as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/chat/completions", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    expected = body.replace(b'{ "include_ob', b'{"include_usage":true, "include_ob')
    assert upstream.requests[-1].body == expected


@pytest.mark.parametrize("space", [b"\n", b" " * 100_000])
def test_options_are_found_whatever_space_ends_the_body(
    gateway: Gateway, upstream: Upstream, key: str, space: bytes
) -> None:
    """The whole is in pieces itself, since no one of its members is long."""
    members = b"".join(b'"m%d":[%b1],' % (n, b'"x",' * 7000) for n in range(4))
    body = b'{"model":"m","stream":true,%b"stream_options":{"x":{}}}%b' % (members, space)
    with gateway.client(key) as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/chat/completions", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    expected = body.replace(b'{"x":{}', b'{"include_usage":true,"x":{}')
    assert upstream.requests[-1].body == expected


def test_schemas_of_old_functions_are_their_authors_words(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    function = {"name": "f", "parameters": {"examples": [{"file_id": "abc"}]}}
    body: dict[str, Any] = {"model": "m", "messages": [], "functions": [function]}
    with gateway.client(key) as client:
        assert client.post("/chat/completions", json=body).status_code == 200
        for theirs in ({**function, "file_id": "abc"}, {"x": {"file_id": "abc"}}):
            body["functions"] = [theirs]
            assert client.post("/chat/completions", json=body).status_code == 400
        body["functions"] = {"file_id": "abc"}
        assert client.post("/chat/completions", json=body).status_code == 400
        tool = {"type": "function", "name": "f", "output_schema": {"examples": [{"file_id": "a"}]}}
        body = {"model": "m", "input": "x", "tools": [tool]}
        assert client.post("/responses", json=body).status_code == 200
        body["tools"] = [{**tool, "file_id": "a"}]
        assert client.post("/responses", json=body).status_code == 400
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("length", [300, 100_000])
def test_a_tools_model_has_a_name_of_some_length(length: int) -> None:
    tool = {"type": "image_generation", "model": "m" * length}
    body = json.dumps({"model": "m", "input": "x", "tools": [tool]}).encode()
    with pytest.raises(Refusal) as refused:
        result_of(RequestBody.read_body(body, body))
    assert refused.value.message == "The model of a tool has more than 256 characters."


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        (items(b"{},")(60_100), "20000 items"),
        (tools(b"{},")(12_100), "4000 tools"),
        (
            body(
                tools=b"[%b]"
                % b",".join(
                    b'{"type":"image_generation","svg":{"model":"m%d"}}' % n for n in range(17)
                )
            ),
            "16 different models",
        ),
        (b"{" + b",".join(b'"%d":1' % n for n in range(1001)) + b"}", "1000 members"),
        (body(file_ids=b"[%b]" % b",".join(b'"f%d"' % n for n in range(20_001))), "20000 stored"),
        (body(x=times(b'{"file_id":"a"},', 900_000)), "50000 times"),
        (CORPUS["deep lists"](1_000_000), "30000 long"),
        (body(x=b'"%b"' % (b"a" * 40_000), y=times(b'"aaaaaaaaaaaaa",', 33 << 20)), "outside long"),
        (body(text=b'{"format":' * 9 + b"{}" + b"}" * 9, file_id=b'""'), "8 levels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_that_is_out_of_bounds_is_told_so(text: bytes, bound: str) -> None:
    with pytest.raises(Refusal) as refused:
        result_of(RequestBody.read_body(text, text)).further_models()
    assert refused.value.code == "invalid_request"
    assert bound in refused.value.message


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5_000, 20_000])
@pytest.mark.parametrize("end", ["", "a" * 50 + "\N{GRINNING FACE}"])
def test_what_is_kept_of_ids_is_known(count: int, end: str) -> None:
    """It can take many times the memory of the body, and in one of usual proportions takes less."""
    ids = [f"{number:x}{end}" for number in range(count)]
    bodies: list[dict[str, Any]] = [
        {"input": [{"id": each} for each in ids]},
        {"input": [{"id": each, "role": "user", "content": ""} for each in ids]},
        {"other": [{"file_id": each} for each in ids]},
        {"other": {"vector_store_ids": ids}},
    ]
    for body in bodies:
        text = json.dumps({"model": "gpt-up", **body}, ensure_ascii=False).encode()
        result_of(RequestBody.read_body(text, text))
        tracemalloc.start()
        content = result_of(RequestBody.read_body(text, text))
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert kept < len(text) + content.excess_bytes + 10_000


def test_the_ids_of_a_usual_history_take_no_more_than_its_text() -> None:
    items = [{"id": f"msg_{each:050}", "role": "user", "content": "x" * 700} for each in range(99)]
    text = json.dumps({"model": "gpt-up", "input": items}).encode()
    assert result_of(RequestBody.read_body(text, text)).excess_bytes == 0
