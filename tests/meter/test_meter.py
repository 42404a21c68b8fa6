"""The meter finds the usage however the bytes are cut, believes no fake, changes nothing."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redbtc.meter import usage_fields
from redbtc.meter.answers import IMAGE_TOOL, MAX_WHOLE, decode_answer
from redbtc.meter.estimates import MaximumUsage, SeenOutput, estimate
from redbtc.meter.meters import JSONMeter, Meter
from redbtc.meter.report import Report
from redbtc.meter.streams import StreamMeter
from redbtc.usage import Usage, UsagePart
from tests.helpers.upstream import (
    CHAT_USAGE,
    IMAGE_USAGE,
    RESPONSE_USAGE,
    chat_chunk,
    response_object,
)

pytestmark = pytest.mark.promise_2

FAKE = '{"usage":{"input_tokens":666,"output_tokens":666,"prompt_tokens":666}}'
CHAT_USED = Usage(20, 8, 2, 7, 3)
RESPONSE_USED = Usage(30, 10, 4, 9, 5)
TEXTS = st.one_of(st.sampled_from([FAKE, '"usage"', "[DONE]", '\\"', "data: x\n\n"]), st.text())


EACH_BYTE = [-1]


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    if places == EACH_BYTE:
        return [whole[at : at + 1] for at in range(len(whole))]
    edges = sorted({0, len(whole), *(place % (len(whole) + 1) for place in places)})
    return [whole[a:b] for a, b in itertools.pairwise(edges)]


def run(meter: Meter, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """What passes before the end is committed, and what waits for it."""
    passed, waited = b"", b""
    for piece in pieces:
        if meter.state == "ended":
            waited += meter.rest() + meter.feed(piece)
        else:
            passed += meter.feed(piece)
    meter.finish()
    return passed, waited + meter.rest()


def framed(content: Any, newline: str, style: int, name: str | None = None) -> bytes:
    """One event in any of the framings that the standard allows."""
    text = content if isinstance(content, str) else json.dumps(content)
    lines = [f"event: {name}"] if name and style & 1 else []
    space = "" if style & 2 else " "
    if style & 4 and text.startswith("{"):
        halves = [text[:1], *text[1:].split(", ", 1)]
        if len(halves) == 3:
            halves[1] += ","
        lines += [f"data:{space}{half}" for half in halves]
    else:
        lines.append(f"data:{space}{text}")
    if style & 8:
        lines.insert(0, ': a comment with "usage"')
    return (newline.join(lines) + newline * 2).encode()


@st.composite
def chats(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    style = draw(st.integers(0, 15))
    words = draw(st.lists(TEXTS, max_size=4))
    asked = draw(st.booleans())
    chunks = [chat_chunk("m", {"content": word}, usage=None) for word in words]
    chunks.append(chat_chunk("m", {"tool_calls": [{"function": {"arguments": FAKE}}]}))
    if asked:
        chunks.append({**chat_chunk("m", {}), "choices": [], "usage": CHAT_USAGE})
    else:
        chunks[-1]["usage"] = CHAT_USAGE  # LiteLLM #36168: in a chunk with choices
    events = [framed(chunk, newline, style) for chunk in chunks]
    return [*events, framed("[DONE]", newline, style)], asked


CUTS = st.one_of(st.just(EACH_BYTE), st.lists(st.integers(0, 5000), max_size=12))


@settings(max_examples=400, deadline=None)
@given(chats(), CUTS)
def test_chat_streams(chat: tuple[list[bytes], bool], places: list[int]) -> None:
    events, asked = chat
    whole = b"".join(events)
    plain = StreamMeter(images=False, chat=True, take_out_usage=False)
    passed, rest = run(plain, cut(whole, places))
    assert passed + rest == whole
    assert plain.state == "ended"
    assert plain.report.usage == CHAT_USED
    taking = StreamMeter(images=False, chat=True, take_out_usage=True)
    passed, rest = run(taking, cut(whole, places))
    kept = events[:-2] + events[-1:] if asked else events
    assert passed + rest == b"".join(kept)
    assert taking.report.usage == CHAT_USED
    assert taking.report.model == "m"


@settings(max_examples=400, deadline=None)
@given(
    st.lists(TEXTS, max_size=4),
    st.sampled_from(["completed", "incomplete", "failed"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(0, 15),
    CUTS,
)
def test_responses_streams(
    words: list[str], end: str, newline: str, style: int, places: list[int]
) -> None:
    begun = {"response": response_object(usage=None, status="x")}
    events: list[tuple[str, dict[str, Any]]] = [("response.created", begun)]
    events += [("response.output_text.delta", {"delta": word}) for word in words]
    last = response_object(metadata={"usage": {"input_tokens": 1}}, status=end)
    events.append((f"response.{end}", {"response": last}))
    framed_events = [
        framed({"type": name, **content}, newline, style, name) for name, content in events
    ]
    whole = b"".join(framed_events)
    meter = StreamMeter(images=False, chat=False, take_out_usage=False)
    passed, rest = run(meter, cut(whole, places))
    assert passed + rest == whole
    assert meter.state == "ended"
    assert meter.report.usage == RESPONSE_USED
    assert meter.report.failed == (end == "failed")
    assert (meter.report.response_id, meter.report.service_tier) == ("resp_1", "default")
    before = b"".join(framed_events[:-1])
    assert passed == before, "the terminal event, and nothing before it, waits"


@settings(max_examples=200, deadline=None)
@given(TEXTS, CUTS, st.booleans())
def test_json_answers(text: str, places: list[int], indent: bool) -> None:
    content = response_object(output=[{"text": text, "usage": {"input_tokens": 5}}], extra=text)
    whole = json.dumps(content, indent=2 if indent else None).encode()
    meter = JSONMeter(images=False)
    passed, rest = run(meter, cut(whole, places))
    assert passed + rest == whole
    assert len(rest) == 1
    assert meter.report.usage == RESPONSE_USED


def test_what_was_made_is_known_beside_large_pictures() -> None:
    items = [{"id": f"ig_{n}", "result": "A" * (1 << 20), "parts": [{"id": 1}]} for n in range(4)]
    report = metered(response_object(output=items))
    assert list(report.made) == ["resp_1", "ig_0", "ig_1", "ig_2", "ig_3"]
    assert report.usage == RESPONSE_USED


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base64", "logprobs", "escapes"])
@pytest.mark.parametrize("framing", ["json", "sse"])
def test_tens_of_megabytes_in_bounded_memory(kind: str, framing: str) -> None:
    filling = {
        "base64": b'"' + b"QUJD" * 6_000_000 + b'"',
        "logprobs": b"[" + b'{"token":"a]\\"[","logprob":-0.5,"top":[[1],{}]},' * 400_000 + b"0]",
        "escapes": b'"' + b'\\"\\\\usage\\":{' * 1_500_000 + b'"',
    }[kind]
    usage = json.dumps(RESPONSE_USAGE).encode()
    start, end = b'{"id":"resp_1","output":[{"x":', b'}],"model":"m","usage":' + usage + b"}"
    meter: Meter = JSONMeter(images=False)
    if framing == "sse":
        start = b'event: response.completed\ndata: {"type":"response.completed","response":' + start
        end += b"}\n\n"
        meter = StreamMeter(images=False, chat=False, take_out_usage=False)
    tracemalloc.start()
    size = 0
    whole = memoryview(start + filling + end)
    tracemalloc.reset_peak()
    base, _ = tracemalloc.get_traced_memory()
    for at in range(0, len(whole), 65536):
        size += len(meter.feed(bytes(whole[at : at + 65536])))
    meter.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size + len(meter.rest()) == len(whole)
    assert meter.report.usage == RESPONSE_USED
    assert meter.report.response_id == "resp_1"
    assert peak - base < 16 * MAX_WHOLE, (peak - base) / MAX_WHOLE


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, None),
        ("12", None),
        ([], None),
        ({}, None),
        ({"input_tokens": -1, "output_tokens": "3"}, None),
        ({"input_tokens": 1.5, "output_tokens": 10**18}, None),
        ({"input_tokens": True, "output_tokens": 2}, Usage(output_tokens=2)),
        ({"input_tokens": 0, "output_tokens": 0}, Usage(input_tokens=0, output_tokens=0)),
        (
            {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 6}, "output_tokens": 1},
            Usage(input_tokens=5, output_tokens=1),
        ),
        (
            {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": None},
            Usage(input_tokens=5, output_tokens=1),
        ),
    ],
)
def test_odd_usage_is_neither_believed_nor_invented(usage: Any, expected: Usage | None) -> None:
    assert usage_fields.read_usage(usage, images=False) == expected


@pytest.mark.parametrize("usage", ["xAI", "Gemini", "included", "no total", "responses"])
@pytest.mark.parametrize("size", [0, 2 * MAX_WHOLE])
def test_reasoning_that_stands_beside_the_output_is_output(usage: str, size: int) -> None:
    """Of xAI's chats, and of Gemini's in some gateways (CLIProxyAPI #5733, sub2api #5771)."""
    reasoning = {"reasoning_tokens": 60}
    chat = {"prompt_tokens": 21, "completion_tokens_details": reasoning}
    shown, expected = {
        "xAI": (
            {**chat, "completion_tokens": 7, "total_tokens": 88},
            Usage(21, None, None, 67, 60),
        ),
        "Gemini": (
            {**chat, "completion_tokens": 0, "total_tokens": 81},
            Usage(21, None, None, 60, 60),
        ),
        "included": (
            {**chat, "completion_tokens": 67, "total_tokens": 88},
            Usage(21, None, None, 67, 60),
        ),
        "no total": ({**chat, "completion_tokens": 7}, Usage(21, None, None, 7)),
        "responses": (
            {
                "input_tokens": 21,
                "output_tokens": 7,
                "output_tokens_details": reasoning,
                "total_tokens": 88,
            },
            Usage(21, None, None, 67, 60),
        ),
    }[usage]
    answer = {"id": "chatcmpl-1", "choices": [{"x": "x" * size}], "usage": shown}
    assert metered(answer).usage == expected


def metered(answer: dict[str, Any], images: bool = False) -> Report:
    meter = JSONMeter(images)
    meter.feed(json.dumps(answer).encode())
    meter.finish()
    return meter.report


def test_tool_usage() -> None:
    tools = {
        "image_gen": {
            "input_tokens": 50,
            "input_tokens_details": {"image_tokens": 40, "text_tokens": 10},
            "output_tokens": 1000,
            "output_tokens_details": {"image_tokens": 990, "text_tokens": 10},
            "cached_tokens_details": {"cached_text_tokens": 4, "cached_image_tokens": 0},
        },
        "web_search": {"num_requests": 3},
    }
    report = metered(response_object(tool_usage=tools))
    assert report.usage == Usage(30, 10, 4, 9, 5, 40, 990, 3, tool_input_tokens=10)
    said, drawn = report.parts
    assert said == UsagePart(None, Usage(30, 10, 4, 9, 5, web_searches=3), False)
    assert drawn == UsagePart(IMAGE_TOOL, Usage(50, 4, None, 1000, None, 40, 990), True)


def test_an_svgs_author_comes_on_top() -> None:
    svg = {"model": "gpt-svg", "input_tokens": 7, "output_tokens": 300, "reasoning_tokens": 100}
    report = metered({"data": [], "usage": IMAGE_USAGE, "svg_usage": svg}, images=True)
    assert report.usage == Usage(57, None, None, 572, 100, 40, 272)
    assert [part.model for part in report.parts] == [None, "gpt-svg"]
    assert metered({"data": [], "svg_usage": svg}, images=True).usage == Usage(
        input_tokens=7, output_tokens=300, reasoning_tokens=100
    )


def test_authors_of_svgs_are_added_up_apart_from_their_pictures() -> None:
    """Where the answer does not name the author, either."""
    shown = {"usage": IMAGE_USAGE, "svg_usage": {"input_tokens": 7, "output_tokens": 300}}
    drawn = {"type": "image_generation.completed", "b64_json": "PHN2Zz4=", **shown}
    meter = StreamMeter(images=True, chat=False, take_out_usage=False, ends=3)
    for _ in range(3):
        meter.feed(framed(drawn, "\n", 0))
    meter.finish()
    pictures, authors = meter.report.parts
    assert pictures == UsagePart(None, Usage(150, None, None, 816, None, 120, 816), True)
    assert authors == UsagePart(None, Usage(21, None, None, 900), False)
    assert meter.report.usage == Usage(171, None, None, 1716, None, 120, 816)
    most = MaximumUsage(1000, 816, 0, 0, 0)
    torn = estimate(
        meter.report, SeenOutput(), written=0, read=0, maximum=most, images=True, partly=True
    )
    assert torn.parts == meter.report.parts, "the author's, too, where the stream is cut off"
    assert torn.usage == meter.report.usage


def test_what_an_answer_made_is_named() -> None:
    """The response, the items of its output, and a conversation."""
    items = [{"id": "msg_1"}, {"id": "fc_2"}, {"type": "compaction"}]
    answer = response_object(output=items, conversation={"id": "conv_1"})
    assert set(metered(answer).made) == {"resp_1", "msg_1", "fc_2", "conv_1"}
    meter = StreamMeter(images=False, chat=False, take_out_usage=False)
    events = [
        {"type": "response.created", "response": response_object(output=[])},
        *[{"type": "response.output_text.delta", "delta": "x"}] * 4,
        {"type": "response.output_item.added", "item": {"id": "msg_9", "content": []}},
    ]
    meter.feed(b"".join(framed(each, "\n", 0) for each in events))
    assert list(meter.report.made) == ["resp_1", "msg_9"]
    assert meter.report.status == "completed"


CITATION = {"type": "container_file_citation", "container_id": "cntr_3", "file_id": "cfile_4"}
PATH = {"type": "file_path", "file_id": "cfile_5"}


def test_containers_of_an_answer_are_named_where_the_upstream_names_them() -> None:
    """Not where the text of a client or of a tool's server comes back."""
    text = {"type": "output_text", "text": "", "annotations": [CITATION, PATH, {"file_id": "x"}, 1]}
    schema = {"container_id": "no", "content": [{"annotations": [CITATION]}], "id": "no"}
    items = [
        {"id": "ci_1", "container_id": "cntr_1", "code": "container_id", "outputs": [schema]},
        {"id": "sh_1", "environment": {"type": "container_reference", "container_id": "cntr_2"}},
        {"id": "msg_1", "content": [text, {"annotations": None}, "no"]},
        {"id": "mcpl_1", "tools": [{"input_schema": schema, "annotations": [CITATION]}]},
        {"id": "sh_2", "environment": "local", "content": "text", "container_id": ["no"]},
    ]
    stored = dict.fromkeys(["resp_1", "ci_1", "sh_1", "msg_1", "mcpl_1", "sh_2"], False)
    made = stored | dict.fromkeys(["cntr_1", "cntr_2", "cntr_3", "cfile_4", "cfile_5"], True)
    assert metered(response_object(output=items)).made == made
    meter = StreamMeter(images=False, chat=False, take_out_usage=False)
    begun = response_object(output=[], status="in_progress", usage=None)
    dull = [{"type": "response.output_text.delta", "delta": "x"}] * 4
    done = [{"type": "response.output_item.done", "item": each} for each in items]
    for each in [{"type": "response.created", "response": begun}, *dull, *done]:
        meter.feed(framed(each, "\n", 0))
    assert meter.report.made == made


ODD = {
    "half a character": ('{"id":"msg_1","text":"\\ud83d"}', True),
    "no number": ('{"id":"msg_1","logprob":-Infinity,"x":NaN}', True),
    "no number in a list": ('{"id":"msg_1","x":[NaN]}', False),
    "a control character": ('{"id":"msg_1","text":"a\nb"}', True),
    "depth in a list": ('{"id":"msg_1","x":' + "[" * 3000 + "]" * 3000 + "}", False),
    "depth": ('{"id":"msg_1","x":' + '{"usage":' * 3000 + "1" + "}" * 3001, False),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", ["output", "text"])
def test_what_a_strict_parser_does_not_take_is_metered(odd: str, place: str) -> None:
    """A client can have the upstream say such things, by its tools and its words."""
    item, known = ODD[odd]
    member: dict[str, Any] = {place: ["X"] if place == "output" else "X"}
    whole = json.dumps(response_object(**member))
    answer = whole.replace('"X"', item).encode()
    for text in (answer, b"\xef\xbb\xbf" + answer):
        meter = JSONMeter(images=False)
        passed = meter.feed(text)
        meter.finish()
        assert passed + meter.rest() == text
        assert meter.report.usage == RESPONSE_USED
        assert (meter.report.response_id, meter.report.status) == ("resp_1", "completed")
        assert not known or place != "output" or "msg_1" in meter.report.made
    if b"\n" in answer:
        return
    stream = StreamMeter(images=False, chat=False, take_out_usage=False)
    stream.feed(b'data: {"type":"response.completed","response":' + answer + b"}\n\n")
    assert stream.state == "ended"
    assert stream.report.usage == RESPONSE_USED


def test_the_last_usage_counts() -> None:
    meter = StreamMeter(images=False, chat=True, take_out_usage=False)
    for total in (1, 5, 9):
        chunk = chat_chunk("m", {"content": "x"})
        chunk["usage"] = {"prompt_tokens": 4, "completion_tokens": total}
        meter.feed(framed(chunk, "\n", 0))
    assert meter.report.usage == Usage(input_tokens=4, output_tokens=9)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), CUTS, st.booleans(), st.booleans())
def test_any_bytes_pass_unchanged(
    whole: bytes, places: list[int], chat: bool, streamed: bool
) -> None:
    meter: Meter = JSONMeter(images=False)
    if streamed:
        meter = StreamMeter(images=False, chat=chat, take_out_usage=False)
    pieces = cut(whole, places)
    got = b""
    for piece in pieces:
        got += meter.feed(piece)
        if meter.state == "ended":
            got += meter.rest()
    meter.finish()
    assert got + meter.rest() == whole


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"usage":'])
def test_hostile_json_is_no_answer(body: bytes) -> None:
    assert decode_answer(body) is None
