"""What audio costs, whichever rates its price has and whatever its answer reports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from tests.gateway.test_endpoints import MP3, PRICED, SECOND, price, transcribe, usage_of
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.upstream import DONE, Received, Reply, Upstream, event, json_answer, stream
from tests.request_body.packers import PACKERS

pytestmark = pytest.mark.promise_2

TEXT = "a" * 4000
TOKENS = {"input_tokens": 900, "output_tokens": 6000, "total_tokens": 6900}
HOUR = 3600 * SECOND  # bytes
HEARD = {"type": "tokens", "input_tokens": 1500, "output_tokens": 25}


@pytest.fixture
def priced(make_gateway: MakeGateway) -> Gateway:
    return make_gateway(PRICED).start()


def speak(gateway: Gateway, **more: str) -> httpx2.Response:
    body = {"model": "speaker", "input": TEXT, "voice": "alloy", "stream_format": "sse", **more}
    with gateway.client(gateway.new_key()) as client:
        return client.post("/audio/speech", json=body)


def done(usage: Mapping[str, Any] | None) -> bytes:
    return event({"type": "speech.audio.done", "usage": usage})


@pytest.mark.parametrize(
    ("rates", "cost"),
    [
        ({"characters": "15"}, "0.06"),
        ({"characters": "15", "input": "1"}, "0.06"),
        ({"characters": "15", "output": "10"}, "0.06"),
        ({"characters": "15", "audio_output": "10"}, "0.06"),
        ({"characters": "15", "input": "1", "audio_output": "10"}, "0.0609"),
        ({"input": "1", "audio_output": "10"}, "0.0609"),
        ({"audio_output": "10"}, "0.06"),
        ({"input": "2"}, "0.008"),
    ],
)
def test_speech_is_billed_by_the_rates_that_there_are(
    priced: Gateway, upstream: Upstream, rates: dict[str, str], cost: str
) -> None:
    """Reported tokens cost nothing without a rate for the output; then the characters count."""
    price(priced, "speaker", **rates)
    upstream.script = stream([done(TOKENS)])
    speak(priced)
    assert priced.row()["cost"] == cost


def test_speech_that_is_heard_has_its_own_audio(priced: Gateway, upstream: Upstream) -> None:
    """Audio among the input does not make text of the output."""
    price(priced, "speaker", input="0.6", audio_output="12")
    heard = {"input_token_details": {"text_tokens": 9, "audio_tokens": 5}}
    upstream.script = stream([done({**TOKENS, **heard})])
    speak(priced)
    assert priced.row()["cost"] == "0.07254"  # 900 * 0.6 + 6000 * 12


@pytest.mark.parametrize("ending", ["tear", "end"])
def test_early_usage_of_speech_is_not_all(priced: Gateway, upstream: Upstream, ending: str) -> None:
    price(priced, "speaker", characters="15", input="0.6", output="12")
    delta = {"type": "speech.audio.delta", "audio": "QUFB" * 100}
    early = event({**delta, "usage": {"input_tokens": 14, "output_tokens": 1}})
    upstream.script = stream([early, *[event(delta)] * 9], end=ending)
    try:
        speak(priced)
    except httpx2.HTTPError:
        assert ending == "tear"
    assert (priced.row()["usage_source"], priced.row()["cost"]) == ("estimated", "0.06")


@pytest.mark.parametrize("name", ["SSE", "sse ", "events"])
def test_speech_has_two_stream_formats(priced: Gateway, upstream: Upstream, name: str) -> None:
    """Another name could mean one of them to the upstream, for which nothing is held."""
    price(priced, "speaker", characters="15")
    answer = speak(priced, stream_format=name)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_format")
    assert not upstream.requests


def test_events_of_speech_are_metered_whatever_their_type_says(
    priced: Gateway, upstream: Upstream
) -> None:
    price(priced, "speaker", input="1", audio_output="10")
    upstream.script = json_answer(done(TOKENS), content_type="application/octet-stream")
    assert speak(priced).content == done(TOKENS)
    assert (priced.row()["usage_source"], priced.row()["cost"]) == ("upstream", "0.0609")


def test_audio_in_place_of_events_is_counted(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "speaker", characters="15")
    upstream.script = json_answer(MP3, content_type="audio/mpeg")
    assert speak(priced).content == MP3
    assert (priced.row()["usage_source"], priced.row()["cost"]) == ("counted", "0.06")


@pytest.mark.parametrize(
    ("answered", "length_ms", "source"),
    [
        ({"usage": HEARD}, 90_000, "estimated"),
        ({"usage": {**HEARD, "input_token_details": {"audio_tokens": 1000}}}, 60_000, "estimated"),
        ({"usage": {**HEARD, "seconds": 80}}, 80_000, "upstream"),
        ({"usage": HEARD, "duration": 80.5}, 80_500, "upstream"),
        ({"usage": {"seconds": 80, "input_tokens": 0, "output_tokens": 0}}, 80_000, "upstream"),
        ({"usage": {"output_tokens": 375}}, 100_000, "estimated"),
        ({"usage": {"input_tokens": 0, "output_tokens": 0}}, 100_000, "estimated"),
    ],
)
def test_a_price_by_the_minute_bills_the_length(
    priced: Gateway, upstream: Upstream, answered: dict[str, Any], length_ms: int, source: str
) -> None:
    """OpenAI's price list has rates by the minute for models whose answers report tokens."""
    price(priced, "transcriber", audio_minute="0.006")
    upstream.script = json_answer({"text": "words " * 250, **answered})
    transcribe(priced, size=100 * SECOND)
    row = priced.row()
    assert (row["audio_ms"], row["usage_source"]) == (length_ms, source)
    assert float(row["cost"]) == pytest.approx(length_ms * 0.006 / 60_000)
    if row["input_tokens"]:
        assert (row["input_tokens"], row["output_tokens"]) == (1500, 25)


def test_zero_tokens_of_a_transcription_are_not_believed(
    priced: Gateway, upstream: Upstream
) -> None:
    price(priced, "transcriber", input="2.5", output="10")
    usage = {"input_tokens": 0, "output_tokens": 0}
    for script in (
        json_answer({"text": "a" * 40_000, "usage": usage}),
        stream([event({"type": "transcript.text.done", "text": "a" * 40_000, "usage": usage})]),
    ):
        upstream.script = script
        transcribe(priced, {"stream": "true"}, size=100 * SECOND)
    for row in priced.rows():
        assert (row["usage_source"], row["output_tokens"]) == ("estimated", 10_000)
        assert row["input_tokens"] > 40_000  # it takes 44 minutes to say that


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"text": "Hi", "duration": 3600}, "application/json"),
        (b"1\n00:00:00,000 --> 01:00:00,000\nHi\n", "text/plain"),
        (b"words " * 9000, "text/plain"),
        ({"text": "words " * 9000}, "application/json"),
        ({"text": "words " * 9000, "usage": {"output_tokens": 13_500}}, "application/json"),
    ],
)
def test_an_hour_has_its_tokens(
    priced: Gateway, upstream: Upstream, answer: Any, kind: str
) -> None:
    """They are not bounded as those of a picture are."""
    price(priced, "transcriber", audio_input="6")
    upstream.script = json_answer(answer, content_type=kind)
    transcribe(priced, size=HOUR // 4)
    assert float(priced.row()["cost"]) == pytest.approx(0.36, rel=0.01)


@pytest.mark.parametrize(
    ("text", "length_ms"),
    [
        (b"words " * 10_000 + b" his best was 00:09.580 then.", 4_001_933),
        (b"1\n00:00:00,000 --> 00:59:00,000\nAt 00:01.000\n", 3_540_000),
        (
            b"2\n00:01:00,000 --> 00:59:00,000\nA\n\n1\n00:00:00,000 --> 00:01:00,000\nB\n",
            3_540_000,
        ),
        (b"WEBVTT\n\n00:01.000 --> 59:00.000 align:start\nA\n", 3_540_000),
    ],
)
def test_only_the_times_of_subtitles_are_a_length(
    priced: Gateway, upstream: Upstream, text: bytes, length_ms: int
) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    upstream.script = json_answer(text, content_type="text/plain")
    transcribe(priced, size=HOUR // 4)
    assert priced.row()["audio_ms"] == length_ms


@pytest.mark.parametrize("kind", ["text/plain", "text/vtt", "application/x-subrip", None])
def test_subtitles_are_known_whatever_their_type(
    priced: Gateway, upstream: Upstream, kind: str | None
) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    text = b"1\n00:00:00,000 --> 00:10:00,000\nHi\n"
    upstream.script = json_answer(text, content_type=kind)
    assert transcribe(priced, size=600 * SECOND // 16).content == text
    assert priced.row()["cost"] == "0.06"


def test_json_after_a_blank_is_metered(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", input="2.5")
    text = json.dumps({"text": "Hi", "usage": HEARD}).encode()

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, {"content-type": "text/plain"})
        await reply.send(b"\n")
        await asyncio.sleep(0.1)
        await reply.send(text)
        await reply.end()

    upstream.script = script
    assert transcribe(priced).content == b"\n" + text
    assert priced.row()["usage_source"] == "upstream"


CHUNK = {"object": "transcription.chunk", "choices": [{"delta": {"content": "a" * 4000}}]}
SEGMENT = {"type": "transcript.text.segment", "text": "a" * 4000, "start": 0.0, "end": 9.0}
DELTA = {"type": "transcript.text.delta", "delta": "a" * 4000}


@pytest.mark.parametrize(
    "events",
    [
        [event(DELTA)] * 10,
        [event({"type": "transcript.text.done", "text": "a" * 40_000})],
        [*[event(DELTA)] * 10, event({"type": "transcript.text.done", "text": "a" * 40_000})],
        [*[event(CHUNK)] * 10, DONE],
        [event(SEGMENT)] * 10,
        [*[event(DELTA), event(SEGMENT)] * 10],
        [*[event(SEGMENT)] * 10, event({"error": {"message": "Broken."}})],
        [*[event(CHUNK)] * 10, event({"error": {"message": "Broken."}})],
        [event({"type": "transcript.text.done", "text": "a" * 40_000, "pad": "b" * 300_000})],
        [*[event({**CHUNK, "pad": "b" * 300_000})] * 10, DONE],
    ],
)
def test_text_that_passed_in_events_counts_once(
    priced: Gateway, upstream: Upstream, events: list[bytes]
) -> None:
    price(priced, "transcriber", input="2.5", output="10")
    upstream.script = stream(events)
    transcribe(priced, {"stream": "true"})
    row = priced.row()
    assert row["usage_source"] == "estimated"
    assert 10_000 <= row["output_tokens"] <= 10_100


@pytest.mark.parametrize("more", [{}, {"error": {"message": "Broken."}}])
def test_text_that_passed_in_json_counts(
    priced: Gateway, upstream: Upstream, more: dict[str, Any]
) -> None:
    """The segments repeat it, and say how it was found."""
    price(priced, "transcriber", input="2.5", output="10")
    segments = [{"text": "a" * 4000, "tokens": list(range(1000)), "temperature": 0.0}] * 10
    upstream.script = json_answer({"text": "a" * 40_000, "segments": segments, **more})
    transcribe(priced, size=100 * SECOND)
    row = priced.row()
    assert row["usage_source"] == "estimated"
    assert 10_000 <= row["output_tokens"] <= 10_100
    assert 44_000 <= row["input_tokens"] <= 45_000


def test_the_text_of_json_gives_its_length(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    text = "\u8bed" * 300  # 900 bytes
    segments = [{"text": text, "tokens": list(range(1000))}]
    upstream.script = json_answer(json.dumps({"text": text, "segments": segments}).encode())
    transcribe(priced, size=60 * SECOND)
    assert priced.row()["audio_ms"] == 60_000


def test_a_torn_length_is_all(priced: Gateway, upstream: Upstream) -> None:
    """Minutes are billed, or tokens; never both."""
    price(priced, "transcriber", audio_minute="0.006", input="2.5", output="10")
    text = b'data: {"usage":{"type":"duration","seconds":90},"text":"Hello wor'
    upstream.script = stream([text], end="tear")
    with pytest.raises(httpx2.HTTPError):
        transcribe(priced, {"stream": "true"})
    assert usage_of(priced.row()) == {"audio_ms": 90_000}


def test_minutes_and_tokens_are_held_for(priced: Gateway, upstream: Upstream) -> None:
    """Whichever the answer reports."""
    price(priced, "transcriber", audio_minute="0.0001", audio_input="6")
    priced.cli("account", "add", "test", "--credit-limit", "0")
    priced.cli("payment", "add", "test", "0.1")
    assert transcribe(priced, size=HOUR // 4).status_code == 429
    assert not upstream.requests


@pytest.mark.parametrize(
    "name", ["url", "file_url", "audio_url", "uri", "audio", "chunking_strategy", "language"]
)
@pytest.mark.parametrize(
    "value",
    [
        "https://example.com/a.mp3",
        ' {"a": "S3://b/a.mp3"}',
        '{"a": "https:\\/\\/b/a.mp3"}',
        '{"a": "https\\u003A/\\u002fb/a.mp3"}',
    ],
)
def test_no_field_has_the_url_of_a_recording(
    priced: Gateway, upstream: Upstream, name: str, value: str
) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    answer = transcribe(priced, {name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    assert not upstream.requests


def test_a_prompt_may_have_a_url(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    upstream.script = json_answer({"text": "Hi", "usage": {"type": "duration", "seconds": 60}})
    fields = {"prompt": "They talk about https://example.com."}
    fields["known_speaker_references[]"] = "data:audio/wav;base64,AAAA"
    assert transcribe(priced, fields).status_code == 200


@pytest.mark.parametrize("names", ['filename=""', "filename*=UTF-8''a.mp3"])
def test_a_file_without_a_name_is_no_url(priced: Gateway, upstream: Upstream, names: str) -> None:
    """Some readers of forms take it for a field."""
    price(priced, "transcriber", audio_minute="0.006")
    parts = [
        ('name="model"', "transcriber"),
        (f'name="file"; {names}', " HTTPS://example.com/long.mp3"),
    ]
    form = "".join(
        f"--x\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in parts
    )
    headers = {"content-type": "multipart/form-data; boundary=x"}
    with priced.client(priced.new_key()) as client:
        answer = client.post("/audio/transcriptions", content=f"{form}--x--\r\n", headers=headers)
    assert answer.status_code == 400
    assert not upstream.requests


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", None])
@pytest.mark.parametrize("named", [True, False])
def test_compressed_usage_of_a_transcription_counts(
    priced: Gateway, upstream: Upstream, coding: str, kind: str | None, named: bool
) -> None:
    price(priced, "transcriber", input="2.5")
    packed = PACKERS[coding](json.dumps({"text": "Hi", "usage": HEARD}).encode())
    headers = {"content-encoding": coding} if named else {}
    upstream.script = json_answer(packed, headers=headers, content_type=kind)
    transcribe(priced)
    assert priced.row()["usage_source"] == "upstream"


def test_summaries_that_passed_count(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "gpt-6-luna", output="10")
    output = [{"trace_summary": "a" * 20_000, "memory_summary": "b" * 20_000}]
    upstream.script = json_answer({"output": output})
    with priced.client(priced.new_key()) as client:
        client.post("/memories/trace_summarize", json={"model": "gpt-6-luna", "traces": []})
    assert 10_000 <= priced.row()["output_tokens"] <= 10_100
