"""The members that the Scanner keeps of an answer's or an event's JSON: a chat completion, a
Response object, a list of images or of input items, or parts of these."""

from __future__ import annotations

import re

from redbtc.meter.nodes import Node

# The members that contain text of the model, or lead to it, in what a model writes: items of an
# output, and messages and deltas of chats.
TEXT_NAMES = re.findall(
    r"\w+",
    "text refusal name arguments input code summary content action query queries command commands "
    "operation diff path transcript audio message delta function custom function_call tool_calls "
    "reasoning reasoning_content trace_summary memory_summary",
)
SHORT_NODE, HEAD_NODE = Node(), Node(strings="head")
TEXT_NODE = Node(strings="length", recursive=True)
TEXT_NODE.elements = TEXT_NODE
TEXT_NODE.add_members(dict.fromkeys(TEXT_NAMES, TEXT_NODE))
TEXT_MEMBERS = dict.fromkeys(TEXT_NAMES, TEXT_NODE)


def short_members(*names: str) -> dict[str, Node]:
    """Return members of which short strings, numbers and literals are kept."""
    return dict.fromkeys(names, SHORT_NODE)


CACHE_WRITES_NODE = Node(short_members("ttl_12h_tokens"))
DETAILS_NODE = Node(
    short_members(
        *("cached_tokens", "cache_write_tokens", "reasoning_tokens", "image_tokens"),
        *("cached_text_tokens", "audio_tokens"),
    )
    | {"cache_write_tokens_details": CACHE_WRITES_NODE}
)
COUNTS_NODE = Node(
    short_members(
        *("input_tokens", "output_tokens", "prompt_tokens", "completion_tokens"),
        *("reasoning_tokens", "total_tokens", "num_requests", "model", "seconds"),
    )
    | {
        f"{each}_tokens_details": DETAILS_NODE
        for each in ("input", "output", "prompt", "completion")
    }
    | dict.fromkeys(("cached_tokens_details", "input_token_details"), DETAILS_NODE),
    whole=True,
)
ANNOTATIONS_NODE = Node(elements=Node(short_members("type", "container_id", "file_id")))
CONTENT_NODE = Node(
    elements=Node(
        TEXT_MEMBERS | short_members("type") | {"annotations": ANNOTATIONS_NODE},
        TEXT_NODE,
        strings="length",
    ),
    strings="length",
)
ITEM_NODE = Node(
    TEXT_MEMBERS
    | short_members("id", "type", "call_id", "container_id", "quality", "size")
    | {"environment": Node(short_members("container_id")), "content": CONTENT_NODE}
    | {
        "action": Node(TEXT_MEMBERS | short_members("type")),
        "encrypted_content": Node(strings="length"),
    }
    | {"result": HEAD_NODE, "b64_json": HEAD_NODE, "url": SHORT_NODE, "svg_usage": COUNTS_NODE}
)
ITEMS_NODE = Node(elements=ITEM_NODE)
CHOICE_NODE = Node(TEXT_MEMBERS | {"usage": COUNTS_NODE}, TEXT_NODE, strings="length")
CHOICES_NODE = Node(elements=CHOICE_NODE)
RESPONSE_MEMBERS = (
    short_members(
        *("id", "type", "model", "status", "service_tier", "stream_id", "output_index"),
        *("quality", "size", "code", "duration"),
    )
    | {"error": Node(short_members("message", "type", "code"))}
    | {"usage": COUNTS_NODE, "svg_usage": COUNTS_NODE, "x_groq": Node({"usage": COUNTS_NODE})}
    | {"tool_usage": Node({"image_gen": COUNTS_NODE, "web_search": COUNTS_NODE}, whole=True)}
    | {
        "conversation": Node(short_members("id")),
        "incomplete_details": Node(short_members("reason")),
    }
    | {"choices": CHOICES_NODE, "delta": TEXT_NODE, "audio": TEXT_NODE, "b64_json": HEAD_NODE}
    | {"text": TEXT_NODE}
    | {"output": ITEMS_NODE, "data": ITEMS_NODE, "item": ITEM_NODE}
)
ANSWER_NODE = Node(RESPONSE_MEMBERS | {"response": Node(RESPONSE_MEMBERS)})
