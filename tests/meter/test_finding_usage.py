"""The usage of an answer is found whatever stands around it, however it is cut, compressed and
labelled: what the meter says is compared with an honest parse of the whole."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import json
import random
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli
import httpx2
import pytest

from redbtc.meter import scanner as scanner_module
from redbtc.meter.answers import MAX_WHOLE, answer_steps
from redbtc.meter.decoded_meter import DecodedMeter
from redbtc.meter.decoding import Decoding, NotDecoded, codings_of
from redbtc.meter.meters import JSONMeter, Meter
from redbtc.meter.nodes import Node
from redbtc.meter.report import Report
from redbtc.meter.scanner import Scanner
from redbtc.meter.streams import StreamMeter
from redbtc.steps import result_of
from redbtc.usage import Usage
from tests.helpers.gateway import Gateway, wait_until
from tests.helpers.speed import longest_step
from tests.helpers.upstream import (
    CHAT_USAGE,
    IMAGE_USAGE,
    RESPONSE_USAGE,
    Headers,
    Received,
    Reply,
    Script,
    Upstream,
    chat_chunk,
    chat_pieces,
    event,
    images_pieces,
    json_answer,
    response_object,
    response_pieces,
    stream,
)

pytestmark = pytest.mark.promise_2

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHAT_USED = Usage(20, 8, 2, 7, 3)
RESPONSE_USED = Usage(30, 10, 4, 9, 5)
MODEL = {"model": "gpt-up"}
CHAT = {**MODEL, "messages": [], "stream": True}


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


PACK: dict[str, Callable[[bytes], bytes]] = {
    "identity": lambda data: data,
    "gzip": gzip.compress,
    "x-gzip": members,
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "zstd": zstd.compress,
    "br": brotli.compress,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}


def pieces_of(whole: bytes, chance: random.Random) -> list[bytes]:
    """Cut at random places, sometimes at each byte."""
    if len(whole) < 3000 and chance.random() < 0.3:
        return [whole[at : at + 1] for at in range(len(whole))]
    edges = sorted(chance.randrange(len(whole) + 1) for _ in range(chance.randrange(12)))
    return [whole[a:b] for a, b in zip([0, *edges], [*edges, len(whole)], strict=True)]


def feed(meter: Meter, chunk: bytes, chance: random.Random) -> bytes:
    """At once or in steps."""
    if chance.random() < 0.5:
        return meter.feed(chunk)
    return result_of(meter.steps(chunk))


def run(meter: Meter, pieces: list[bytes], chance: random.Random) -> tuple[bytes, bytes]:
    """Return what passes before the row is committed, and what waits for it."""
    passed, waited = b"", b""
    for piece in pieces:
        if meter.state == "ended":
            waited += meter.rest() + piece
        else:
            passed += feed(meter, piece, chance)
    meter.finish()
    return passed, waited + meter.rest()


# ── The scanner ──────────────────────────────────────────────────────────────────────────────────

NAMES = ["usage", "id", "x", "output", "response", "", 'q"', "é", "x\\", "item", "input_tokens"]
STRINGS = ["", "a", '"', "\\", '"}],', "usage", "é😀", "[[{", "\n", "x" * 40, 'y"\\' * 900]


def random_json(chance: random.Random, depth: int = 5) -> Any:
    kind = chance.randrange(9 if depth else 6)
    if kind >= 6:
        size = chance.choice([0, 1, 2, 5, 40 if depth < 3 else 3])
        if kind == 6:
            return [random_json(chance, depth - 1) for _ in range(size)]
        return {chance.choice(NAMES): random_json(chance, depth - 1) for _ in range(size)}
    return chance.choice([chance.choice(STRINGS), 0, -1.5, 12.0, True, None, 10**15])


def honest(value: Any, node: Node | None, list_element: bool = False) -> Any:
    """What a scanner has to keep of a value."""
    if node is None or (
        isinstance(value, dict | list) and not node.keeps(b"[{"[isinstance(value, dict)])
    ):
        return None
    if isinstance(value, dict):
        kept = {name.encode(): each for name, each in value.items()}
        return {
            name.decode(): honest(kept[name], member)
            for name, member in node.members.items()
            if name in kept
        }
    if isinstance(value, list):
        return [honest(each, node.elements) for each in value]
    if isinstance(value, str):
        return honest_string(value, node)
    return value


def honest_string(value: str, node: Node) -> str | int:
    size = len(json.dumps(value)) - 2
    if node.strings == "head":
        return value
    if node.strings == "length" and size > scanner_module.MAX_TEXT:
        return -size
    return value if size + 2 <= scanner_module.MAX_STRING else ""


INNER = Node({"id": Node(), "x": Node(strings="length"), "input_tokens": Node()})
MIDDLE = Node({"usage": INNER, "output": Node(elements=INNER), "id": INNER})
ROOT = Node({"response": MIDDLE, "é": INNER, "usage": INNER}, elements=MIDDLE)
ROOT.add_members({"output": Node(elements=MIDDLE), "item": ROOT})


def test_a_scanner_keeps_what_an_honest_parse_finds() -> None:
    for seed in range(1500):
        chance = random.Random(seed)
        value = {"item": random_json(chance), "usage": random_json(chance, 2)}
        if chance.random() < 0.5:
            value = {chance.choice(NAMES): random_json(chance) for _ in range(6)}
        text = json.dumps(value, indent=chance.choice([None, None, 1])).encode()
        reader = Scanner(ROOT)
        for piece in pieces_of(text, chance):
            reader.feed(piece)
        assert reader.found is not None, seed
        assert json.loads(reader.found) == honest(value, ROOT), seed


def test_a_scanner_takes_any_bytes() -> None:
    parts = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\",
        b'"usage"',
        b"1",
        b" ",
        b"\xff",
        b"nul",
    ]
    for seed in range(3000):
        chance = random.Random(seed)
        text = b"{" + b"".join(chance.choices(parts, k=chance.randrange(60)))
        reader = Scanner(ROOT)
        for piece in pieces_of(text, chance):
            reader.feed(piece)
        kept = reader.close()
        assert kept is None or isinstance(json.loads(kept), dict), seed


def shapes(size: int) -> dict[str, bytes]:
    """Values of about so many bytes that are dear to parse."""
    return {
        "string": b'"' + b"QUJD" * (size // 4) + b'"',
        "escapes": b'"' + b'\\"\\\\usage\\":{' * (size // 13) + b'"',
        "deep lists": b"[" * (size // 2) + b"]" * (size // 2),
        "deep objects": b'{"usage":' * (size // 10) + b"1" + b"}" * (size // 10),
        "empty objects": b"[" + b"{}," * (size // 3) + b"0]",
        "empty strings": b"{" + b'"":"",' * (size // 6) + b'"":1}',
        "members": b"{" + b'"usage":{},' * (size // 11) + b'"":1}',
        "numbers": b"[" + b"1," * (size // 2) + b"0]",
        "a long name": b'{"' + b"n" * size + b'":1}',
    }


@pytest.mark.parametrize("shape", shapes(1))
@pytest.mark.parametrize("place", ["text", "output", "metadata"])
def test_no_size_hides_the_usage_or_holds_the_loop(shape: str, place: str) -> None:
    filling = shapes(6_000_000)[shape]
    usage = json.dumps(RESPONSE_USAGE).encode()
    start = b'{"id":"resp_1","model":"m","status":"completed","%b":' % place.encode()
    whole = start + filling + b',"usage":' + usage + b"}"
    meter = JSONMeter(images=False)
    assert longest_step(meter.steps(whole)) < 30
    meter.finish()
    assert meter.report.usage == RESPONSE_USED
    assert (meter.report.response_id, meter.report.status) == ("resp_1", "completed")
    data = (
        b'event: response.completed\ndata: {"type":"response.completed","response":%b}\n\n' % whole
    )
    streamed = StreamMeter(images=False, chat=False, take_out_usage=False)
    feed(streamed, data, random.Random(1))
    assert streamed.state == "ended"
    assert streamed.report.usage == RESPONSE_USED
    message = b'{"type":"response.completed","response":%b}' % whole
    answer = result_of(answer_steps(message.decode()))
    assert answer is not None
    assert answer.inner is not None
    assert answer.inner.usage["input_tokens"] == 30


def dense_answers(size: int) -> dict[str, bytes]:
    """Return answers of about this size that consist of as many values as fit."""

    def listed(element: str) -> str:
        return f"[{','.join([element] * (size // (len(element) + 1)))}]"

    outputs = {
        "empty items": listed("{}"),
        "numbered items": json.dumps(
            [{"id": f"msg_{n}", "type": "message"} for n in range(size // 40)]
        ),
        "searches": listed('{"type":"web_search_call"}'),
        "containers": listed('{"type":"shell_call","container_id":"c"}'),
        "items beside what is none": f"[NaN,{listed('{}')[1:]}",
        "parts": f'[{{"content":{listed("{}")}}}]',
        "words": f'[{{"text":{listed("[[[[[]]]]]")}}}]',
    }
    answers = {name: f'"output":{output}' for name, output in outputs.items()}
    answers["members"] = ",".join(['"id":1'] * (size // 7))
    end = ',"id":"resp_1","model":"m"%s}'
    used = ',"usage":' + json.dumps(RESPONSE_USAGE)
    whole = {name: "{" + each + end % used for name, each in answers.items()}
    whole |= {f"{name}, no usage": "{" + each + end % "" for name, each in answers.items()}
    return {name: each.encode() for name, each in whole.items()}


def turns_of(meter: Meter, whole: bytes, size: int, tear: bool) -> Iterator[None]:
    """Meter an answer that comes in chunks of this size, in the steps that the relay takes."""
    for at in range(0, len(whole), size):
        chunk = whole[at : at + size]
        if len(chunk) <= meter.at_once:
            meter.feed(chunk)
            yield
        else:
            yield from meter.steps(chunk)
    if meter.at_once:
        (meter.cut_off if tear else meter.finish)()
    else:
        yield from meter.cut_off_steps() if tear else meter.finish_steps()


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Exclude objects of earlier tests from full garbage collections, which take time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("dense", dense_answers(1))
@pytest.mark.parametrize(("size", "chunk"), [(250_000, 16 << 10), (300_000, 64 << 10)])
def test_no_number_of_values_holds_the_loop(dense: str, size: int, chunk: int) -> None:
    whole = dense_answers(size)[dense]
    used = None if "no usage" in dense else RESPONSE_USED
    event = b'data: {"type":"response.completed","response":%b}' % whole
    streamed = {"images": False, "chat": False, "take_out_usage": False}
    for tear in (False, True):
        for meter, sent in ((JSONMeter(False), whole), (StreamMeter(**streamed), event)):
            assert longest_step(turns_of(meter, sent, chunk, tear)) < 25
            report = meter.report
            found = (report.response_id, report.usage and report.usage.output_tokens)
            assert found == ("resp_1", used and used.output_tokens)


@pytest.mark.usefixtures("small_heap")
def test_an_event_that_is_full_of_lines_does_not_hold_the_loop() -> None:
    event = b":\n" * 120_000 + b'data: {"choices":[],"usage":\n' + b"data:\n" * 1000
    event += b"data: %b}\n\n" % json.dumps(CHAT_USAGE).encode()
    meter = StreamMeter(images=False, chat=True, take_out_usage=True)
    assert longest_step(turns_of(meter, event, 16 << 10, False)) < 25
    assert meter.report.usage == CHAT_USED


@pytest.mark.slow
def test_no_number_of_items_takes_much_memory() -> None:
    meter = StreamMeter(images=False, chat=False, take_out_usage=False)
    tracemalloc.start()
    for number in range(30_000):
        item = {"id": f"ws_{number}", "type": "web_search_call", "action": {"query": "q" * 8}}
        meter.feed(event({"type": "response.output_item.done", "item": item}, ""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000_000, peak
    assert meter.report.text_bytes == 30_000 * 8


def test_items_beside_much_text_are_learned() -> None:
    items: list[Any] = [
        {"id": f"fc_{n}", "type": "function_call", "arguments": '{"a":"' + "é\n" * 50_000}
        for n in range(3)
    ]
    items.append({"id": "ci_1", "type": "code_interpreter_call", "container_id": "cntr_1"})
    answer = response_object(output=items, text={"schema": [[{}] * 90_000]})
    meter = JSONMeter(images=False)
    meter.feed(json.dumps(answer).encode())
    meter.finish()
    assert list(meter.report.made) == ["resp_1", "fc_0", "fc_1", "fc_2", "ci_1", "cntr_1"]
    assert list(meter.report.containers) == ["cntr_1"]


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────

FILLERS = [b": PING\n\n", b"\n", b'data: {"type":"keepalive","sequence_number":1}\n\n']
EMPTY = {"id": "", "model": "", "choices": [], "prompt_filter_results": [{}]}


def test_model_and_id_are_looked_for_until_they_are_known() -> None:
    created = {"type": "response.created", "response": response_object(usage=None, status="queued")}
    for chat, first in ((False, created), (True, chat_chunk("gpt-up", {"content": "x"}))):
        fillers = [*FILLERS * 12, *[event(EMPTY)] * 12] if chat else FILLERS * 12
        meter = StreamMeter(images=False, chat=chat, take_out_usage=False)
        assert b"".join(map(meter.feed, fillers)) == b"".join(fillers)
        meter.feed(event(first))
        assert meter.report.model == "gpt-up"
        assert meter.report.response_id == first.get("id", "resp_1")
        text = {"type": "response.output_text.delta", "delta": "x"}
        assert meter.can_skip_parsing(
            event(chat_chunk("gpt-up", {"content": "x"}) if chat else text)
        )


USAGE_CHUNKS: list[dict[str, Any]] = [
    {"choices": []},
    {"choices": None},
    {},
    {"id": "chatcmpl-1", "model": "gpt-up", "choices": []},
]


@pytest.mark.parametrize("chunk", range(len(USAGE_CHUNKS) + 1))
@pytest.mark.parametrize("late", [False, True])
def test_the_usage_chunk_that_was_asked_for_is_taken_out(chunk: int, late: bool) -> None:
    """Before [DONE], or after it. With an error in it, it is none."""
    usage = {"prompt_tokens": 20.0, "completion_tokens": 7, "prompt_tokens_details": {}}
    spaced = b'data: {"choices" : [ ],"usage":' + json.dumps(usage).encode() + b"}\n\n"
    extra = event({**USAGE_CHUNKS[chunk], "usage": usage}) if chunk < 4 else spaced
    kept = [event(chat_chunk("gpt-up", {"content": "x"}, usage=None)), b"data: [DONE]\n\n"]
    pieces = [*kept, extra] if late else [kept[0], extra, kept[1]]
    for seed in range(30):
        meter = StreamMeter(images=False, chat=True, take_out_usage=True)
        passed, rest = run(
            meter, pieces_of(b"".join(pieces), random.Random(seed)), random.Random(seed)
        )
        assert passed + rest == b"".join(kept)
        assert passed == kept[0]
        assert meter.report.usage == Usage(input_tokens=20, output_tokens=7)
    failed = event({**json.loads(extra[6:]), "error": {"message": "no"}})
    meter = StreamMeter(images=False, chat=True, take_out_usage=True)
    assert meter.feed(failed) == failed


def test_usage_of_all_kinds_counts() -> None:
    def used(*chunks: dict[str, Any]) -> Usage | None:
        meter = StreamMeter(images=False, chat=True, take_out_usage=False)
        for chunk in chunks:
            meter.feed(event(chunk))
        return meter.report.usage

    groq = chat_chunk("m", {}, x_groq={"id": "req_1", "usage": CHAT_USAGE})
    assert used(groq) == CHAT_USED
    zero = {"prompt_tokens": 0, "completion_tokens": 0.0}
    assert used(chat_chunk("m", {}, usage=zero)) == Usage(input_tokens=0, output_tokens=0)
    assert used(chat_chunk("m", {}, usage=CHAT_USAGE), chat_chunk("m", {}, usage=None)) == CHAT_USED
    zeros = {"input_tokens": 0, "output_tokens": 0, "input_tokens_details": None}
    assert used(chat_chunk("m", {}, usage={**zeros, **CHAT_USAGE})) == CHAT_USED
    for nothing in (0, None):
        both = {"prompt_tokens": nothing, "completion_tokens": nothing, **RESPONSE_USAGE}
        assert metered(response_object(usage=both)).usage == RESPONSE_USED
    writes = {"cache_write_tokens": 9, "cache_write_tokens_details": {"ttl_12h_tokens": 6}}
    for name, value in (("ttl_12h_tokens", 6), ("ttl_30m_tokens", None)):
        writes["cache_write_tokens_details"] = {name: 6}
        usage = {"input_tokens": 20, "output_tokens": 1, "input_tokens_details": writes}
        report = metered(response_object(usage=usage))
        assert report.usage is not None
        assert report.usage.cache_write_12h_tokens == value
    writes["cache_write_tokens_details"] = {"ttl_12h_tokens": 10}
    report = metered(response_object(usage=usage))
    assert report.usage == Usage(
        input_tokens=20, cached_input_tokens=None, cache_write_tokens=9, output_tokens=1
    )


def metered(answer: Any, images: bool = False) -> Report:
    meter = JSONMeter(images)
    meter.feed(json.dumps(answer).encode())
    meter.finish()
    return meter.report


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [0, MAX_WHOLE])
def test_usage_within_a_choice_counts(stream: bool, size: int) -> None:
    """Moonshot reports it there, https://github.com/earendil-works/pi/issues/2017."""
    choice = {"index": 0, "delta": {"content": "x" * size}, "usage": CHAT_USAGE}
    text = chat_chunk("gpt-up", {}) | {"choices": [choice]}
    meter: Meter = JSONMeter(images=False)
    if stream:
        meter = StreamMeter(images=False, chat=True, take_out_usage=True)
    meter.feed(event(text) if stream else json.dumps(text).encode())
    meter.finish()
    assert meter.report.usage == CHAT_USED
    assert meter.report.is_of_one_choice


@pytest.mark.parametrize("nothing", [{}, {"prompt_tokens": 0}, {"prompt_tokens": None}])
def test_input_and_output_count_though_different_events_report_them(nothing: Any) -> None:
    """https://github.com/llm-d/llm-d-router/pull/2437"""
    meter = StreamMeter(images=False, chat=True, take_out_usage=False)
    told = {"completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 3}}
    meter.feed(event(chat_chunk("m", {}, usage={**CHAT_USAGE, "completion_tokens": 1})))
    meter.feed(event(chat_chunk("m", {"content": "Hello"}, usage={**nothing, **told})))
    assert meter.report.usage == CHAT_USED
    assert not meter.report.is_outdated
    meter.feed(event(chat_chunk("m", {"content": "Hello"}, usage=dict.fromkeys(CHAT_USAGE, 0))))
    assert meter.report.usage == CHAT_USED
    assert meter.report.is_outdated, "text has followed"


def test_usage_beside_the_response_counts() -> None:
    meter = StreamMeter(images=False, chat=False, take_out_usage=False)
    done = {"response": response_object(usage=None), "usage": RESPONSE_USAGE}
    meter.feed(event({"type": "response.completed", **done}, "response.completed"))
    assert meter.report.usage == RESPONSE_USED


def test_each_picture_of_a_stream_is_added_up() -> None:
    pieces = images_pieces(0)
    for seen, output, state in ((3, 816, "ending"), (1, 272, "open")):
        meter = StreamMeter(images=True, chat=False, take_out_usage=False, ends=3)
        passed = b"".join(meter.feed(pieces[0]) for _ in range(seen))
        assert passed == pieces[0] * min(seen, 2), "the last one waits"
        assert meter.state is state
        assert meter.report.usage is not None
        assert meter.report.usage.output_tokens == output
        assert [part.usage.output_tokens for part in meter.report.parts] == [output]
        meter.finish()
        assert meter.state == "ended"
        assert meter.report.image_tokens == seen * 4160


def test_a_picture_that_is_cut_off_after_others_is_not_the_end() -> None:
    (whole,) = images_pieces(0)
    meter = StreamMeter(images=True, chat=False, take_out_usage=False, ends=3)
    passed = meter.feed(whole + whole[:-20])
    meter.finish()
    assert passed + meter.rest() == whole + whole[:-20]
    assert meter.state != "ended"
    assert meter.report.image_tokens == 2 * 4160


def test_text_that_is_cut_off_counts_once() -> None:
    """Its client can leave while the row is being written, after the upstream has ended."""
    meter = StreamMeter(images=False, chat=True, take_out_usage=False)
    meter.feed(event(chat_chunk("m", {"content": "x" * 4000}))[:-100])
    meter.finish()
    seen = meter.report.text_bytes
    assert seen > 3800
    meter.cut_off()
    assert meter.report.text_bytes == seen


# ── What has passed ──────────────────────────────────────────────────────────────────────────────


def png(width: int, height: int) -> str:
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height)
    return base64.b64encode(head + bytes(400_000)).decode()


CALLS: list[dict[str, Any]] = [
    {"id": "msg_1", "type": "message", "content": [{"type": "output_text", "text": "t" * 1000}]},
    {"id": "fc_1", "type": "function_call", "name": "n" * 10, "arguments": "a" * 500},
    {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "e" * 4000},
    {"id": "ws_1", "type": "web_search_call", "action": {"type": "search", "query": "q"}},
    {"id": "ws_2", "type": "web_search_call", "action": {"type": "open_page", "url": "u"}},
    {"id": "ws_3", "type": "web_search_call"},
    {"id": "fs_1", "type": "file_search_call", "queries": ["q"]},
    {"id": "ci_1", "type": "code_interpreter_call", "code": "c" * 100, "container_id": "cntr_1"},
    {"id": "ig_1", "type": "image_generation_call", "quality": "low", "result": png(2048, 1024)},
]
TEXT_BYTES = 1000 + 510 + 1 + 1 + 100


def check_passed(report: Report) -> None:
    assert TEXT_BYTES <= report.text_bytes <= TEXT_BYTES + 10
    assert report.sealed_bytes == 4000
    assert report.image_tokens == 544
    assert (report.web_searches, report.file_searches) == (2, 1)
    assert list(report.containers) == ["cntr_1"]


def item_events() -> list[dict[str, Any]]:
    deltas = [
        *({"type": "response.output_text.delta", "delta": "t" * 10} for _ in range(100)),
        {"type": "response.output_text.done", "text": "t" * 1000},
    ]
    done = [{"type": "response.output_item.done", "item": each} for each in CALLS]
    begun = [{"type": "response.output_item.added", "item": {**CALLS[3], "action": None}}]
    return [*deltas, *begun, *done]


@pytest.mark.parametrize("large", [False, True])
def test_what_has_passed_of_a_response_counts_once(large: bool) -> None:
    filling: dict[str, Any] = {"text": {"schema": ["x"] * 100_000 if large else []}}
    whole = response_object(usage=None, output=CALLS, **filling)
    check_passed(metered(whole))
    torn = JSONMeter(images=False)
    torn.feed(json.dumps(whole).encode()[:-20])
    torn.cut_off()
    check_passed(torn.report)
    assert torn.report.status is None
    meter = StreamMeter(images=False, chat=False, take_out_usage=False)
    for each in item_events():
        meter.feed(event(each))
    check_passed(meter.report)
    meter.feed(event({"type": "response.completed", "response": whole}))
    check_passed(meter.report)
    report = metered(response_object(output=CALLS, **filling))
    assert report.usage is not None
    assert (report.usage.web_searches, report.usage.file_searches) == (2, 1)
    assert report.parts[0].usage == report.usage


def test_what_has_passed_of_a_chat_counts_in_all_choices() -> None:
    call = {"function": {"name": "n" * 10, "arguments": "a" * 90}}
    choices = [{"message": {"content": "t" * 100, "refusal": "r" * 50, "tool_calls": [call]}}] * 2
    assert metered({"choices": choices}).text_bytes == 500
    meter = StreamMeter(images=False, chat=True, take_out_usage=False)
    delta = {"content": "t" * 5, "reasoning_content": "r" * 5, "tool_calls": [call]}
    for _ in range(10):
        meter.feed(event(chat_chunk("m", delta)))
    assert meter.report.text_bytes == 1100
    long = StreamMeter(images=False, chat=True, take_out_usage=False)
    long.feed(event(chat_chunk("m", {"content": "t" * (2 * MAX_WHOLE)})))
    assert long.report.text_bytes == 2 * MAX_WHOLE
    long.feed(event(chat_chunk("m", {"content": "t" * (2 * MAX_WHOLE)}))[:-50])
    long.cut_off()
    assert long.report.text_bytes > 4 * MAX_WHOLE - 50


def test_pictures_are_measured() -> None:
    for quality, size, data, tokens in (
        ("low", "1024x1024", "", 272),
        ("medium", "2048x1024", "", 2112),
        ("auto", "auto", png(512, 1024), 2080),
        (None, None, "x", 4160),
        ("high", None, png(60_000, 60_000), 32906),
    ):
        answer = {"data": [{"b64_json": data or "x"}] * 2, "quality": quality, "size": size}
        assert metered(answer, images=True).image_tokens == 2 * tokens
        completed = {"type": "image_generation.completed", "b64_json": data or "x"}
        meter = StreamMeter(images=True, chat=False, take_out_usage=False)
        meter.feed(event({**completed, "type": "image_generation.partial_image"}))
        meter.feed(event({**completed, "quality": quality, "size": size}))
        assert meter.report.image_tokens == tokens + 100


# ── Compressed answers ───────────────────────────────────────────────────────────────────────────


def decoded_meter(encoding: str, chat: bool, labelled: bool = False) -> DecodedMeter:
    def choose(streams: bool) -> Meter:
        if streams:
            return StreamMeter(images=False, chat=chat, take_out_usage=False)
        return JSONMeter(images=False)

    codings = codings_of([(b"content-encoding", encoding.encode())])
    return DecodedMeter(Report(images=False), codings, labelled, choose)


def answers(chance: random.Random) -> tuple[bytes, bool, Usage]:
    """A whole answer, whether it is a chat's, and its usage."""
    text = chance.choice(["", "Hello", '"usage":{"input_tokens":6}', "x" * 5000])
    echo = {"schema": random_json(chance), "text": text * chance.choice([1, 1, 60])}
    kind = chance.randrange(4)
    if kind == 0:
        return json.dumps(response_object(output=[echo], text=echo)).encode(), False, RESPONSE_USED
    if kind == 1:
        choice = {"message": {"content": text}}
        return json.dumps({"choices": [choice], "usage": CHAT_USAGE}).encode(), True, CHAT_USED
    fillers = chance.choices(FILLERS, k=chance.randrange(9))
    if kind == 2:
        return b"".join([*fillers, *chat_pieces([text, text])]), True, CHAT_USED
    pieces = response_pieces([text])
    last = {"type": "response.completed", "response": response_object(text=echo)}
    return b"".join([*fillers, *pieces[:-1], event(last)]), False, RESPONSE_USED


def test_answers_of_all_kinds_are_metered_whatever_their_encoding() -> None:
    for seed in range(400):
        chance = random.Random(seed)
        whole, chat, usage = answers(chance)
        encoding = chance.choice(list(PACK))
        packed = PACK[encoding](whole)
        meter = decoded_meter(encoding, chat, labelled=chance.random() < 0.5)
        pieces = pieces_of(packed, chance)
        passed, rest = run(meter, pieces, chance)
        assert passed + rest == packed, seed
        assert meter.state == "ended", seed
        assert meter.report.usage == usage, (seed, encoding)
        before = decoded_until_error(encoding, passed)
        assert len(before) < len(whole), "the end waits"
        torn = decoded_meter(encoding, chat)
        for piece in pieces[:-1]:
            feed(torn, piece, chance)
        torn.cut_off()
        assert torn.report.usage in (None, usage), seed


def decoded_until_error(encoding: str, packed: bytes) -> bytes:
    decoding = Decoding(codings_of([(b"content-encoding", encoding.encode())]))
    got = b""
    try:
        for piece in decoding.decoded(packed):
            got += piece
    except NotDecoded:
        pass
    return got


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "gzip, br"])
def test_a_bomb_costs_time_in_small_steps_and_no_memory(encoding: str) -> None:
    filling = b'"' + b" " * (24 << 20) + b'"'
    whole = b'{"text":' + filling + b',"usage":' + json.dumps(RESPONSE_USAGE).encode() + b"}"
    meter = decoded_meter(encoding, chat=False)
    assert longest_step(meter.steps(PACK[encoding](whole))) < 30
    meter.finish()
    assert meter.report.usage == RESPONSE_USED


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "br", "compress"])
def test_what_can_not_be_decoded_passes(encoding: str) -> None:
    whole = b"\x01" + json.dumps(response_object()).encode() * 100
    meter = decoded_meter(encoding, chat=False)
    passed, rest = run(meter, pieces_of(whole, random.Random(1)), random.Random(1))
    assert passed + rest == whole
    assert rest
    assert meter.state == "ended"
    assert meter.report.usage is None


# ── Through the gateway ──────────────────────────────────────────────────────────────────────────


def answer_of(
    pieces: list[bytes], headers: Headers = (), end: str = "clean", length: bool = False
) -> Script:
    async def script(_: Received, reply: Reply) -> None:
        size = sum(map(len, pieces))
        await reply.head(200, headers, f"length:{size}" if length else "chunked")
        for piece in pieces:
            await reply.send(piece)
        if end == "tear":
            reply.tear()
        if end == "hang":
            await reply.wait(_.closed)
        await reply.end()

    return script


LABELS = [None, "text/plain", "application/json", "text/event-stream"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("length", [False, True])
def test_the_label_does_not_decide_what_an_answer_is(
    gateway: Gateway, upstream: Upstream, key: str, label: str | None, length: bool
) -> None:
    headers = [("content-type", label)] if label else []
    start = b"\xef\xbb\xbf\n\n"
    with gateway.client(key) as client:
        pieces = [start, *chat_pieces(["Hello"])]
        upstream.script = answer_of(pieces, headers, length=length)
        answer = client.post("/chat/completions", json=CHAT)
        assert answer.content == b"".join([*pieces[:-2], pieces[-1]])
        whole = json.dumps(response_object()).encode()
        upstream.script = answer_of([b" \n", whole], headers, length=length)
        assert client.post("/responses", json={**MODEL, "input": ""}).content == b" \n" + whole
    rows = gateway.rows()
    assert {row["outcome"] for row in rows} == {"completed"}
    assert {(row["input_tokens"], row["output_tokens"]) for row in rows} == {(20, 7), (30, 9)}


def test_an_event_without_a_label_passes_in_time(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    pieces = response_pieces(["Hello", "there"])
    upstream.script = answer_of(pieces[:-1], end="hang")
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**MODEL, "input": "", "stream": True}) as answer,
    ):
        got = b""
        for chunk in answer.iter_raw():
            got += chunk
            if got == b"".join(pieces[:-1]):
                break


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "br"])
def test_a_compressed_answer_passes_and_is_metered(
    gateway: Gateway, upstream: Upstream, key: str, encoding: str
) -> None:
    whole = json.dumps(response_object()).encode()
    headers = [("content-type", "application/json"), ("content-encoding", encoding)]
    with gateway.client(key) as client:
        packed = PACK[encoding](whole)
        upstream.script = answer_of([packed], headers, length=True)
        with client.stream("POST", "/responses", json={**MODEL, "input": ""}) as answer:
            assert b"".join(answer.iter_raw()) == packed
        assert client.get("/responses/resp_1").status_code == 200, "its id is learned"
        packed = PACK[encoding](b"".join(chat_pieces(["Hello"])))
        headers[0] = ("content-type", "text/event-stream")
        upstream.script = answer_of([packed], headers, end="hang")
        with client.stream("POST", "/chat/completions", json=CHAT) as answer:
            assert b"".join(answer.iter_raw()) == packed
    response, chat = gateway.rows()
    assert (chat["usage_source"], chat["output_tokens"]) == ("upstream", 7)
    assert (response["usage_source"], response["output_tokens"]) == ("upstream", 9)


WRONG = [
    *(("aws-chunked", "identity"), ("UTF-8", "identity"), ("none", "identity")),
    *(("gzip", "identity"), ("br, gzip", "identity"), ("utf-8, gzip", "gzip")),
    *((None, "gzip"), (None, "zstd"), (None, "deflate"), ("identity", "gzip"), ("br", "zstd")),
]


@pytest.mark.parametrize(("named", "real"), WRONG)
def test_an_encoding_that_is_named_wrongly_does_not_hide_the_usage(
    gateway: Gateway, upstream: Upstream, key: str, named: str | None, real: str
) -> None:
    headers = [("content-encoding", named)] if named else []
    with gateway.client(key) as client:

        def ask(path: str, body: Any, sent: bytes, kind: str, passed: bytes) -> None:
            upstream.script = answer_of(
                [sent[:20], sent[20:]], [("content-type", kind), *headers], length=True
            )
            with client.stream("POST", path, json=body) as answer:
                assert b"".join(answer.iter_raw()) == passed

        sent = PACK[real](json.dumps(response_object()).encode())
        ask("/responses", {**MODEL, "input": ""}, sent, "application/json", sent)
        with client.stream("GET", "/responses/resp_1") as answer:
            assert answer.status_code == 200, "its id is learned"
        pieces = chat_pieces(["Hello"])
        sent = PACK[real](b"".join(pieces))
        plain = b"".join([*pieces[:-2], pieces[-1]])  # without the usage that it did not ask for
        passed = plain if real == "identity" else sent
        ask("/chat/completions", CHAT, sent, "text/event-stream", passed)
    found = [(row["outcome"], row["usage_source"], row["output_tokens"]) for row in gateway.rows()]
    assert found == [("completed", "upstream", 9), ("completed", "upstream", 7)]


@pytest.mark.parametrize("size", [1, 3, 7, 8, 100])
def test_the_start_of_an_answer_tells_its_encoding_wherever_it_is_cut(size: int) -> None:
    whole = json.dumps(response_object()).encode()
    for real in ("identity", "gzip", "deflate", "zstd", "br"):
        for named in ("utf-8", "gzip", "zstd", real):
            if real == "br" and named != "br":
                continue  # nothing tells it
            packed = PACK[real](whole)
            meter = decoded_meter(named, chat=False)
            pieces = [packed[at : at + size] for at in range(0, len(packed), size)]
            passed, rest = run(meter, pieces, random.Random(1))
            assert passed + rest == packed
            assert meter.report.usage == RESPONSE_USED, (real, named)


def brotli_in_parts(data: bytes, window_bits: int) -> bytes:
    packer = brotli.Compressor(lgwin=window_bits)
    packed: bytes = packer.process(data) + packer.flush() + packer.finish()
    return packed


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_short_first_chunk_does_not_hide_how_an_answer_is_compressed(
    gateway: Gateway, upstream: Upstream, key: str, first: int
) -> None:
    whole = json.dumps(response_object()).encode()
    packed = {name: PACK[name](whole) for name in ("gzip", "deflate", "zstd")}
    packed |= {f"br {bits}": brotli_in_parts(whole, bits) for bits in (21, 23)}
    assert packed["br 21"][:1] + packed["br 23"][:1] == b"\t\r"
    with gateway.client(key) as client:
        for name, sent in packed.items():
            headers = [("content-encoding", "br")] if name.startswith("br") else []

            async def script(
                _: Received,
                reply: Reply,
                sent: bytes = sent,
                headers: list[tuple[str, str]] = headers,
            ) -> None:
                await reply.head(200, headers)
                for piece in (sent[:first], sent[first:9], sent[9:]):
                    await reply.send(piece)
                    await asyncio.sleep(0.02)
                await reply.end()

            upstream.script = script
            with client.stream("POST", "/responses", json={**MODEL, "input": ""}) as answer:
                assert b"".join(answer.iter_raw()) == sent
            row = gateway.rows()[-1]
            assert (row["usage_source"], row["output_tokens"]) == ("upstream", 9), name


@pytest.mark.parametrize("named", ["gzip", "utf-8", "identity"])
def test_an_upstream_that_compresses_is_asked_for_background_responses_and_models(
    gateway: Gateway, upstream: Upstream, key: str, named: str
) -> None:
    async def script(request: Received, reply: Reply) -> None:
        content: Any = response_object(status="queued", usage=None)
        if request.method == "GET":
            content = response_object()
        if request.path.endswith("/models"):
            content = {"data": [{"id": "gpt-up", "object": "model"}]}
        packed = gzip.compress(json.dumps(content).encode())
        await json_answer(packed, headers=[("content-encoding", named)])(request, reply)

    upstream.script = script
    with gateway.client(key) as client:
        assert [each["id"] for each in client.get("/models").json()["data"]] == ["gpt-up"]
        client.post("/responses", json={**MODEL, "input": "", "background": True})
    wait_until(lambda: gateway.rows()[0]["outcome"] == "completed")
    assert gateway.rows()[0]["output_tokens"] == 9


def test_a_background_response_is_kept_though_comments_come_first(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    created = {"type": "response.created", "response": response_object(usage=None, status="queued")}

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await json_answer(response_object())(request, reply)
        pieces = [*[b": PING\n\n"] * 5, event(created, "response.created")]
        await stream(pieces, end="tear")(request, reply)

    upstream.script = script
    with gateway.client(key) as client:
        with pytest.raises(httpx2.RemoteProtocolError):
            client.post(
                "/responses", json={**MODEL, "input": "", "background": True, "stream": True}
            )
        assert client.get("/responses/resp_1").status_code == 200
    wait_until(lambda: gateway.rows()[0]["outcome"] == "completed")
    assert gateway.rows()[0]["output_tokens"] == 9


def test_usage_that_follows_the_end_is_waited_for(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    *begin, usage, done = chat_pieces(["Hello"])
    with gateway.client(key) as client:
        for follows, end in (([usage], "hang"), ([], "hang"), ([usage], "clean")):
            upstream.script = answer_of(
                [*begin, done, *follows], [("content-type", "text/event-stream")], end
            )
            assert client.post("/chat/completions", json=CHAT).content == b"".join([*begin, done])
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 3
    assert [row["output_tokens"] for row in rows][::2] == [7, 7]
    assert rows[1]["usage_source"] != "upstream"


def test_all_pictures_of_a_stream_are_billed(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    pieces = [*images_pieces(1), *images_pieces(1)]
    body = {**MODEL, "prompt": "x", "stream": True, "n": 2}
    upstream.script = answer_of(pieces, [("content-type", "text/event-stream")])
    with gateway.client(key) as client:
        assert client.post("/images/generations", json=body).content == b"".join(pieces)
    output = IMAGE_USAGE["output_tokens"]
    assert gateway.rows()[0]["output_tokens"] == 2 * output


def large_pictures(count: int, size: int, kind: str) -> list[bytes]:
    """Return the events of `count` pictures of this size: a partial one and a finished one each."""
    image = {"b64_json": png(64, 64) + "A" * size, "created_at": 1}
    part = {"type": f"{kind}.partial_image", **image}
    last = {"type": f"{kind}.completed", **image, "usage": IMAGE_USAGE}
    return [event(each, str(each["type"])) for _ in range(count) for each in (part, last)]


@pytest.mark.parametrize(("count", "coding"), [(3, ""), (5, ""), (5, "gzip")])
@pytest.mark.parametrize("size", [40_000, 1_500_000])
def test_large_pictures_are_all_billed_and_pass_in_time(
    gateway: Gateway, upstream: Upstream, key: str, count: int, coding: str, size: int
) -> None:
    """Also more of them than were asked for."""
    pieces = large_pictures(count, size, "image_edit")
    headers = [("content-type", "text/event-stream")]
    got = threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, headers)
        await reply.send(b"".join(pieces[:4]))
        assert await reply.wait(got)
        for piece in pieces[4:]:
            await reply.send(piece)
        await reply.end()

    if coding:
        sent = PACK[coding](b"".join(pieces))
        upstream.script = answer_of([sent], [*headers, ("content-encoding", coding)])
    else:
        sent, upstream.script = b"".join(pieces), script
    form = {"model": "gpt-up", "prompt": "x", "stream": "true", "n": "3"}
    files = {"image": ("a.png", b"x", "image/png")}
    received = b""
    with (
        gateway.client(key) as client,
        client.stream("POST", "/images/edits", data=form, files=files) as answer,
    ):
        for part in answer.iter_raw():
            received += part
            if len(received) == len(b"".join(pieces[:4])):
                got.set()
    assert received == sent
    row = gateway.rows()[0]
    output = IMAGE_USAGE["output_tokens"]
    assert (row["outcome"], row["output_tokens"]) == ("completed", count * output)


@pytest.mark.parametrize("label", ["application/json", "text/event-stream"])
def test_blanks_before_an_answer_pass_in_time_and_take_no_memory(
    gateway: Gateway, upstream: Upstream, key: str, label: str
) -> None:
    whole = json.dumps(response_object()).encode()
    seen = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", label)])
        await reply.send(b"\n")
        assert await reply.wait(seen)
        for _ in range(640):
            await reply.send(b" " * 65536)
        await reply.send(whole)
        await reply.end()

    upstream.script = script
    before = gateway.rss()
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**MODEL, "input": ""}) as answer,
    ):
        chunks = answer.iter_raw()
        assert next(chunks) == b"\n"
        seen.set()
        rest = b"".join(chunks)
    assert rest == b" " * (640 * 65536) + whole
    assert gateway.rss() - before < 20 << 20
    assert gateway.row()["output_tokens"] == 9


@pytest.mark.parametrize("pieces", [[], [b"\n\n"]])
def test_an_empty_stream_is_not_complete(
    gateway: Gateway, upstream: Upstream, key: str, pieces: list[bytes]
) -> None:
    upstream.script = answer_of(pieces, [("content-type", "text/event-stream")])
    with gateway.client(key) as client:
        assert client.post("/chat/completions", json=CHAT).content == b"".join(pieces)
    assert gateway.row()["outcome"] == "upstream_failed"


@pytest.mark.parametrize("size", [1000, 100_000, 400_000])
@pytest.mark.parametrize("stream", [False, True])
def test_what_has_passed_counts_though_an_answer_ends_too_early(
    gateway: Gateway, key: str, upstream: Upstream, stream: bool, size: int
) -> None:
    text = chat_chunk("gpt-up", {"content": "x" * size})
    whole = event(text) if stream else json.dumps(text).encode()
    cut = whole[:-100]
    headers = [("content-type", "text/event-stream" if stream else "application/json")]

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, headers)
        await reply.send(cut)
        await reply.end()

    upstream.script = script
    with gateway.client(key) as client:
        answer = client.post("/chat/completions", json={**CHAT, "stream": stream})
    assert answer.content == cut
    row = gateway.row()
    assert row["usage_source"] == "estimated"
    assert row["model"] == "gpt-up"
    assert row["output_tokens"] >= size // 4 - 25
