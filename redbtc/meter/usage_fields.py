"""Read token counts from the usage fields of an answer."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec

from redbtc.meter.answer_nodes import CHOICES_NODE, TEXT_MEMBERS, TEXT_NODE
from redbtc.meter.answers import IMAGE_TOOL, Answer, decode_leniently, name_in, objects_in
from redbtc.meter.nodes import Node
from redbtc.meter.scanner import MAX_LEVELS
from redbtc.usage import MAX_TOKENS, Usage, UsagePart

MAX_SEARCHES = 100_000  # web searches of one request; a larger number is not believed
MAX_AUDIO_SECONDS = 1_000_000  # of one request; a larger number is not believed
ANYTHING = msgspec.json.Decoder()
NO_CHOICES = (b"", b"null", b"[]")


def tokens_in(counts: Any, name: str, maximum: int = MAX_TOKENS) -> int | None:
    """Return the count of that name; None if there is none or it is not an integer from 0 to
    `maximum`."""
    count = counts.get(name) if isinstance(counts, dict) else None
    if type(count) is float and count.is_integer():
        count = int(count)
    return count if type(count) is int and 0 <= count <= maximum else None


def usage_elsewhere(answer: Answer, response: Answer) -> Any:
    """Return the usage object of an event whose Response object has none."""
    if isinstance(answer.usage, dict) or not isinstance(response.x_groq, dict):
        return answer.usage
    return response.x_groq.get("usage")


def usage_in_choices(choices: msgspec.Raw) -> Any:
    """Return the last usage object that is a member of a choice, which is where Moonshot puts
    it."""
    if b'"usage"' not in bytes(choices):
        return None
    found = [each.get("usage") for each in objects_in(text_in(choices, CHOICES_NODE))]
    return next((usage for usage in reversed(found) if isinstance(usage, dict)), None)


def can_be_part(whole: int | None, parts: int) -> bool:
    """Return whether parts of this many tokens fit into the whole."""
    return whole is not None and parts <= whole


INPUT_OUTPUT, PROMPT_COMPLETION = ("input", "output"), ("prompt", "completion")


def counts_in(usage: Any, names: tuple[str, str]) -> tuple[int | None, int | None]:
    """Return the tokens of the input and of the output, by their names in one of the shapes."""
    return tokens_in(usage, f"{names[0]}_tokens"), tokens_in(usage, f"{names[1]}_tokens")


def read_usage(usage: Any, images: bool) -> Usage | None:
    """Return the usage that OpenAI's `usage` object reports, in any of its shapes (of chats, audio
    and so on); None if it reports none. Parts that exceed their whole are not believed. Reasoning
    that the total counts in addition to the output is added to the output."""
    if not isinstance(usage, dict):
        return None
    into, out = INPUT_OUTPUT
    tokens_input, tokens_output = counts_in(usage, INPUT_OUTPUT)
    # Some upstreams have both shapes, of which one is all zeros.
    if "prompt_tokens" in usage or "completion_tokens" in usage:
        of_chat = counts_in(usage, PROMPT_COMPLETION)
        if (tokens_input or 0) + (tokens_output or 0) <= sum(each or 0 for each in of_chat):
            into, out = PROMPT_COMPLETION
            tokens_input, tokens_output = of_chat
    if not (tokens_input or tokens_output) and "seconds" in usage:
        length_ms = milliseconds_in(usage["seconds"])
        return None if length_ms is None else Usage(audio_ms=length_ms)
    if tokens_input is tokens_output is None:
        return None
    parts_input = usage.get(f"{into}_tokens_details")
    if parts_input is None and "input_token_details" in usage:  # of a transcription
        parts_input = usage["input_token_details"]
    parts_output = usage.get(f"{out}_tokens_details")
    cached = tokens_in(parts_input, "cached_tokens")
    cache_write = tokens_in(parts_input, "cache_write_tokens")
    believed = can_be_part(tokens_input, (cached or 0) + (cache_write or 0))
    cache_write_12h = writes_for_12h(parts_input, cache_write) if believed and cache_write else None
    reasoning = tokens_in(parts_output, "reasoning_tokens")
    reported = (tokens_input or 0) + (tokens_output or 0)
    if reasoning and tokens_in(usage, "total_tokens") == reported + reasoning:
        tokens_output = (tokens_output or 0) + reasoning
    image_input = image_output = None
    if images:
        image_input = tokens_in(parts_input, "image_tokens")
        image_output = tokens_in(parts_output, "image_tokens")
        if image_output is None:  # without details, all of the output is image tokens
            image_output = tokens_output
    used = Usage(
        input_tokens=tokens_input,
        cached_input_tokens=cached if believed else None,
        cache_write_tokens=cache_write if believed else None,
        output_tokens=tokens_output,
        reasoning_tokens=reasoning if can_be_part(tokens_output, reasoning or 0) else None,
        image_input_tokens=image_input,
        image_output_tokens=image_output,
        cache_write_12h_tokens=cache_write_12h,
    )
    if (type(parts_input) is dict and "audio_tokens" in parts_input) or (
        type(parts_output) is dict and "audio_tokens" in parts_output
    ):
        return with_audio(used, parts_input, parts_output)
    return used


def with_audio(used: Usage, parts_input: Any, parts_output: Any) -> Usage:
    """Return usage with the audio tokens that are parts of its input and output."""
    heard = tokens_in(parts_input, "audio_tokens", used.input_tokens or 0)
    spoken = tokens_in(parts_output, "audio_tokens", used.output_tokens or 0)
    if not (heard or spoken):  # most models say 0, since they have no audio
        return used
    return msgspec.structs.replace(used, audio_input_tokens=heard, audio_output_tokens=spoken)


def milliseconds_in(seconds: Any) -> int | None:
    """Return a length of audio that is given in seconds, as a number or a text, in milliseconds,
    rounded up; None if it is neither, below 0 or above MAX_AUDIO_SECONDS."""
    if isinstance(seconds, str):
        with contextlib.suppress(ValueError):
            seconds = float(seconds)
    is_number = type(seconds) in (int, float) and 0 <= seconds <= MAX_AUDIO_SECONDS
    return math.ceil(seconds * 1000) if is_number else None


def writes_for_12h(details: Any, writes: int) -> int | None:
    """Return how many of the tokens that were written to the cache stay there for 12 hours."""
    tokens = tokens_in(details.get("cache_write_tokens_details"), "ttl_12h_tokens")
    return tokens if can_be_part(writes, tokens or 0) else None


def with_earlier(used: Usage, earlier: Usage) -> Usage:
    """Return a later usage with the input or the output of an earlier one if its own is missing or
    0: some streams report each in a separate event, and usage does not become less."""
    if earlier.input_tokens and not used.input_tokens:
        used = msgspec.structs.replace(
            used,
            input_tokens=earlier.input_tokens,
            cached_input_tokens=earlier.cached_input_tokens,
            cache_write_tokens=earlier.cache_write_tokens,
            cache_write_12h_tokens=earlier.cache_write_12h_tokens,
        )
    if earlier.output_tokens and not used.output_tokens:
        used = msgspec.structs.replace(
            used,
            output_tokens=earlier.output_tokens,
            reasoning_tokens=earlier.reasoning_tokens,
        )
    return used


def added(a: Usage, b: Usage) -> Usage:
    """Return the sum of the usage of two pictures in one stream, which report it separately."""
    return Usage(*[plus(*each) for each in zip(*map(msgspec.structs.astuple, (a, b)), strict=True)])


def plus(a: int | None, b: int | None) -> int | None:
    """Return the sum of two counts; None if both are unknown."""
    return a if b is None else (a or 0) + b


def with_svg(used: Usage | None, parts: list[UsagePart], svg: Any) -> Usage | None:
    """Return an answer's usage with the usage of the model that wrote an SVG added, and append the
    latter to `parts`. According to OpenAI's reference it is reported separately."""
    wrote = read_usage(svg, images=False)
    if wrote is None:
        return used
    reasoning = tokens_in(svg, "reasoning_tokens")
    parts.append(UsagePart(name_in(svg.get("model")), wrote, False))
    used = used or Usage()
    return msgspec.structs.replace(
        used,
        input_tokens=plus(used.input_tokens, wrote.input_tokens),
        output_tokens=plus(used.output_tokens, wrote.output_tokens),
        reasoning_tokens=plus(
            used.reasoning_tokens,
            reasoning if can_be_part(wrote.output_tokens, reasoning or 0) else None,
        ),
    )


def with_tools(used: Usage, parts: list[UsagePart], tools: Any) -> Usage:
    """Return a response's usage with that of its tools, whose tokens don't count as its own. Append
    the image tool's usage to `parts`."""
    if not isinstance(tools, dict):
        return used
    searches = tokens_in(tools.get("web_search"), "num_requests", MAX_SEARCHES)
    if searches is not None:
        used = msgspec.structs.replace(used, web_searches=searches)
    parts[0] = parts[0]._replace(usage=used)
    drawn = read_usage(tools.get("image_gen"), images=True)
    if drawn is None:
        return used
    details = tools["image_gen"].get("cached_tokens_details")
    text = (drawn.input_tokens or 0) - (drawn.image_input_tokens or 0)
    cached = tokens_in(details, "cached_text_tokens")
    drawn = msgspec.structs.replace(
        drawn, cached_input_tokens=cached if can_be_part(text, cached or 0) else None
    )
    parts.append(UsagePart(IMAGE_TOOL, drawn, True))
    return msgspec.structs.replace(
        used,
        image_input_tokens=drawn.image_input_tokens,
        image_output_tokens=drawn.image_output_tokens,
        tool_input_tokens=max(0, text) if drawn.input_tokens is not None else None,
    )


def text_bytes_in(text: Any, levels: int = MAX_LEVELS) -> int:
    """Return how many bytes of text a decoded value contains. A negative number in it stands for a
    text of that length that a scanner has left out."""
    if isinstance(text, str):
        return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    if isinstance(text, dict) and levels:
        members = [value for name, value in text.items() if name in TEXT_MEMBERS]
        return sum(text_bytes_in(value, levels - 1) for value in members)
    if isinstance(text, list) and levels:
        return sum(text_bytes_in(value, levels - 1) for value in text)
    return max(0, -text) if type(text) is int else 0


def text_in(raw: msgspec.Raw, node: Node = TEXT_NODE) -> Any:
    """Decode a value that contains text; return None if it is not JSON."""
    return decode_leniently(raw, ANYTHING, node) if raw else None


def has_choices(answer: Answer) -> bool:
    """Return whether a chat's answer or chunk has any choices."""
    return bytes(answer.choices).translate(None, b" \t\r\n") not in NO_CHOICES
