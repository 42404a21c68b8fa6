"""A simulated upstream that keeps its own ledger, for the differential test.

Every request of the test is a *plan*, which is drawn from a seed: what the client sends and what it
does meanwhile, what the upstream answers, in which form, and what breaks. The upstream finds the
plan of a request by its `x-client-request-id` (in a WebSocket message by `user`, of a stored
response by its id), plays its part of it, and notes what it used and whether it has reported that.

What a plan costs is worked out here, in integers, without any code of the gateway.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import threading
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import brotli
from backports import zstd

from tests.helpers.upstream import Received, Reply, Socket, Torn

# ── Prices ───────────────────────────────────────────────────────────────────────────────────────

MILLION = 1_000_000
DEFAULT_IMAGE_MODEL = "gpt-image-2.6-sunburst"  # of image requests and tools that name none
TEXT = {
    "input": "5.000000123",
    "cached_input": "0.500000007",
    "cache_write": "6.25",
    "cache_write_12h": "10.000000001",
    "output": "30.000000777",
    "web_search": "0.01",
    "file_search": "0.0025",
    "container": "0.03",
    "max_output_tokens": 4000,
}
PICTURES = {
    "input": "5",
    "cached_input": "1.25",
    "output": "10",
    "image_input": "8.000000321",
    "image_output": "30.000000009",
    "max_output_tokens": 5000,
}
PRICES: list[dict[str, Any]] = [
    price
    for family in ("chat-*", "resp-*", "slow-*")
    for price in (
        {"model": family, **TEXT},
        {"model": family, **TEXT, "tier": "flex", "input": "2.5", "output": "15.1"},
        {"model": family, **TEXT, "tier": "priority", "input": "12.5", "output": "75.000000003"},
        {"model": family, **TEXT, "above_input_tokens": 3000, "input": "10", "output": "45"},
    )
] + [{"model": model, **PICTURES} for model in ("picture-*", DEFAULT_IMAGE_MODEL)]


def nanos(amount: str) -> int:
    """An amount of money in billionths."""
    whole, _, part = amount.lstrip("-").partition(".")
    found = int(whole) * 10**9 + int(part.ljust(9, "0"))
    return -found if amount.startswith("-") else found


def rates(model: str, tier: str, input_tokens: int) -> dict[str, int]:
    """The rates in nanos of the model's price for this tier and so much input."""
    found = [p for p in PRICES if p["model"] in (model, f"{model.split('-')[0]}-*")]
    of_tier = [p for p in found if p.get("tier", "default") == tier] or [
        p for p in found if "tier" not in p
    ]
    above = [p for p in of_tier if input_tokens > p.get("above_input_tokens", -1)]
    price = max(above, key=lambda p: p.get("above_input_tokens", 0))
    return {
        name: nanos(rate)
        for name, rate in price.items()
        if name in {*TEXT, *PICTURES} - {"max_output_tokens"}
    }


@dataclass(frozen=True)
class Used:
    """What one answer used. `drawn_…` is of the image tool, which has a model of its own."""

    input: int = 0
    cached: int = 0
    written: int = 0
    written_12h: int = 0  # of `written`
    output: int = 0
    reasoning: int = 0
    image_input: int = 0  # of an image endpoint
    image_output: int = 0
    searches: int = 0
    file_searches: int = 0
    containers: int = 0
    drawn_input: int = 0
    drawn_image_input: int = 0
    drawn_output: int = 0

    def __add__(self, other: Used) -> Used:
        return Used(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))

    def cost(self, model: str, tier: str, image_model: str, images: bool) -> int:
        """Nanos, rounded half up once for each model."""
        of = rates(model, tier, self.input)
        millionths = (
            (self.input - self.cached - self.written - self.image_input) * of["input"]
            + self.cached * of["cached_input"]
            + (self.written - self.written_12h) * of.get("cache_write", 0)
            + self.written_12h * of.get("cache_write_12h", 0)
            + (self.output - self.image_output) * of["output"]
        )
        if images:
            millionths += self.image_input * of["image_input"]
            millionths += self.image_output * of["image_output"]
        cost = (millionths + MILLION // 2) // MILLION
        for count, name in (
            (self.searches, "web_search"),
            (self.file_searches, "file_search"),
            (self.containers, "container"),
        ):
            cost += count * of.get(name, 0)
        if self.drawn_input or self.drawn_output:
            of = rates(image_model, "default", self.drawn_input)
            millionths = (
                (self.drawn_input - self.drawn_image_input) * of["input"]
                + self.drawn_image_input * of["image_input"]
                + self.drawn_output * of["image_output"]
            )
            cost += (millionths + MILLION // 2) // MILLION
        return cost

    def fields(self) -> dict[str, int]:
        """The token fields of the ledger's row."""
        return {
            "input_tokens": self.input,
            "cached_input_tokens": self.cached,
            "cache_write_tokens": self.written,
            "cache_write_12h_tokens": self.written_12h,
            "output_tokens": self.output,
            "reasoning_tokens": self.reasoning,
            "image_input_tokens": self.image_input + self.drawn_image_input,
            "image_output_tokens": self.image_output + self.drawn_output,
            "web_searches": self.searches,
            "file_searches": self.file_searches,
            "containers": self.containers,
            "tool_input_tokens": self.drawn_input - self.drawn_image_input,
        }


# ── Plans ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Plan:
    """One request. `fault` is what breaks; `stage` is where client and upstream meet."""

    number: int
    seed: str
    account: str
    endpoint: str  # the path after /v1
    model: str  # as the client names it; "" where it names none
    body: bytes = b""  # not compressed
    allowed: list[bytes] = field(default_factory=list)  # bodies that may reach the upstream
    sent: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    stream: bool = False
    asks: bool = False  # the client itself asks for usage
    n: int = 1
    limit: int = 4000  # output tokens of one answer
    tier: str = ""  # that the answer reports
    image_model: str = DEFAULT_IMAGE_MODEL
    calls: int = 0  # tool calls at most
    tools: list[str] = field(default_factory=list)
    store: bool = True
    background: bool = False
    builds_on: Plan | None = None
    foreign: bool = False  # what it builds on is the other account's
    pictures: int = 0
    refused: bool = False  # 400 by the gateway
    used: Used = Used()
    images: list[Used] = field(default_factory=list)  # of a streamed image request
    encoding: str = "identity"
    label: str = ""
    shape: str = "last"
    noise: int = 0
    line_end: str = "\n"
    huge: int = 0
    indent: bool = False
    floats: bool = False
    fault: str = ""
    at: float = 0.5  # where in the answer it breaks
    status: int = 200
    polls: int = 1  # until a background response has ended
    fate: str = ""  # of a stored response: "cancel", "lose" or ""
    visits: list[str] = field(default_factory=list)
    lane: str = ""
    steers: bool = False
    session: int = -1

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.paused, self.left = threading.Event(), threading.Event()
        self.done = threading.Event()
        self.arrived = threading.Event()
        self.wire = bytearray()  # the answer's body as it was sent
        self.taken = b""  # what the gateway has to take out of it

    @property
    def chat(self) -> bool:
        return self.endpoint == "/chat/completions"

    @property
    def draws(self) -> bool:
        return self.endpoint.startswith("/images")

    @property
    def responds(self) -> bool:
        return self.endpoint == "/responses"

    @property
    def response_id(self) -> str:
        return f"resp_{self.number}"

    @property
    def bills(self) -> str:
        """The model whose price counts."""
        return self.model or DEFAULT_IMAGE_MODEL

    def cost(self, used: Used) -> int:
        return used.cost(self.bills, self.tier or "default", self.image_model, self.draws)

    def history(self) -> int:
        """Tokens of what the request builds on."""
        before = self.builds_on
        return before.used.input + before.used.output + before.history() if before else 0

    def most(self, more_input: int = 0, answers: int = 1) -> int:
        """Nanos that the request can cost at most, roughly from above."""
        if self.endpoint.endswith("/input_tokens"):
            return 0
        into = len(self.body) + 1600 * self.pictures + self.history() + more_input + 100
        tiers = ("default", "flex", "priority")
        prices = [rates(self.bills, tier, n) for tier in tiers for n in (0, into)]

        def top(*names: str) -> int:
            return max(price.get(name, 0) for price in prices for name in names)

        most = into * top("input", "cache_write", "cache_write_12h", "image_input")
        most += self.limit * self.n * top("output", "image_output")
        if "image_generation" in self.tools or (self.builds_on and self.builds_on.tools):
            drawn = rates(self.image_model, "default", 0)
            most += into * drawn["image_input"] + 5000 * max(1, self.calls) * drawn["image_output"]
        calls = max(self.calls, 4) * (top("web_search") + top("file_search") + top("container"))
        return (most // MILLION + 1 + calls) * answers


# ── Drawing plans ────────────────────────────────────────────────────────────────────────────────

WORDS = ["alpha", "beta", '"usage"', '{"usage":{"input_tokens":9}}', "é", "\\u00e9", "\n", "[DONE]"]
WORDS += ["data:", "naïve", "漢字", "]", "}", "", '.completed"', "error"]
FAULTS = ["tear", "reset", "leave", "leave", "early", "at_end", "silent", "never", "status"]
FAULTS += ["error", "error_late"]
OPTIONS: list[Any] = ["absent", "absent", None, {}, {"include_usage": True}]
OPTIONS += [{"include_usage": False}, {"include_obfuscation": False}, {"include_usage": None}]


def text_of(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


class Drawing:
    """Draws plans from a seed."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.plans: list[Plan] = []
        self.sessions = 0
        self.greedy = False  # answers are as long as they may be, and limited where that is nothing

    def draw(self) -> list[Plan]:
        """The next request, or the requests of a WebSocket session."""
        rng = self.rng
        kind = rng.choices(
            ["chat", "responses", "compact", "tokens", "generations", "edits", "session"],
            [30, 40, 4, 3, 10, 9, 6],
        )[0]
        if kind == "session":
            return self._session()
        plan = self._new(
            {
                "chat": "/chat/completions",
                "responses": "/responses",
                "compact": "/responses/compact",
                "tokens": "/responses/input_tokens",
                "generations": "/images/generations",
                "edits": "/images/edits",
            }[kind]
        )
        self._fill(plan)
        self._break(plan)
        self._encode(plan)
        return [plan]

    def rush(self) -> list[Plan]:
        """One of several requests at once of the account whose balance is nearly spent."""
        kinds = ["/chat/completions", "/responses", "/images/generations", "/images/edits"]
        plan = self._new(self.rng.choice(kinds), "prepaid")
        self.greedy = True
        self._fill(plan)
        self._encode(plan)
        self.greedy = False
        return [plan]

    def hanging(self, kind: str) -> list[Plan]:
        """A request whose answer stops in the middle until the gateway is killed."""
        plan = self._new({"chat": "/chat/completions"}.get(kind, "/responses"), "open")
        plan.stream, plan.background = True, kind == "background"
        self._fill(plan, plain=True)
        plan.fault, plan.at, plan.refused = "hang", 0.7, False
        self._encode(plan, plain=True)
        return [plan]

    def _new(self, endpoint: str, account: str = "") -> Plan:
        rng, number = self.rng, len(self.plans)
        account = account or rng.choice(["prepaid", "prepaid", "open"])
        plan = Plan(number, f"{self.seed}/{number}", account, endpoint, "")
        family = "chat" if plan.chat else "picture" if plan.draws else "resp"
        plan.model = f"{family}-{number}"
        self.plans.append(plan)
        return plan

    def _break(self, plan: Plan) -> None:
        rng = self.rng
        if rng.random() < 0.4 and plan.used != Used():  # a 0 is believed at an answer's end only
            plan.fault = rng.choice(FAULTS)
            plan.at = rng.random()
            plan.status = rng.choice([400, 404, 429, 500, 503]) if plan.fault == "status" else 200
        if plan.fault in ("error", "error_late") and (plan.background or not plan.stream):
            plan.fault = "tear"
        if plan.fault == "silent":
            if plan.draws or plan.builds_on or rng.random() < 0.4:
                plan.fault = "tear"
            else:
                plan.body = plan.body.replace(plan.model.encode(), b"slow-%d" % plan.number)
                plan.allowed = [
                    each.replace(plan.model.encode(), b"slow-%d" % plan.number)
                    for each in plan.allowed
                ]
                plan.model = f"slow-{plan.number}"
        if plan.endpoint.endswith("input_tokens") and plan.fault in ("never",):
            plan.fault = ""

    def _encode(self, plan: Plan, plain: bool = False) -> None:
        rng = self.rng
        plan.sent = plan.body
        form = "content-type" in plan.headers
        plan.headers.setdefault("content-type", "application/json")
        how = "" if plain else rng.choices(["", "gzip", "zstd"], [8, 1, 1])[0]
        if how and not form:
            plan.headers["content-encoding"] = how
            plan.sent = (
                zlib.compress(plan.body, 1, 31) if how == "gzip" else zstd.compress(plan.body)
            )
            plan.allowed = [plan.sent]
            plan.refused = plan.refused or (plan.chat and plan.stream and not plan.asks)
        plan.allowed = plan.allowed or [plan.sent]
        plan.chunked = rng.random() < 0.3

    def _fill(self, plan: Plan, plain: bool = False) -> None:
        """The body, what it will use, and the answer's form."""
        rng = self.rng
        if not plain and not plan.background:
            plan.stream = rng.random() < 0.6
        if plan.endpoint.count("/") == 2 and plan.endpoint.startswith("/responses/"):
            plan.stream = False
        if plan.draws:
            self._fill_images(plan)
        elif plan.chat:
            self._fill_chat(plan, plain)
        else:
            self._fill_response(plan, plain)
        plan.tier = rng.choice(["", "", "default", "flex", "priority"])
        if not plain:
            self._form(plan)

    def _form(self, plan: Plan) -> None:
        rng = self.rng
        plan.encoding = rng.choices(
            ["identity", "gzip", "deflate", "raw", "zstd", "br"], [14, 1, 1, 1, 1, 1]
        )[0]
        right = "text/event-stream; charset=utf-8" if plan.stream else "application/json"
        wrong = ["text/plain", "none", "application/json" if plan.stream else "text/html"]
        plan.label = right if rng.random() < 0.8 else rng.choice(wrong)
        shapes = ["last"] * 4 + [
            "null",
            "absent",
            "spaced",
            "every",
            "finish",
            "groq",
            "after_done",
        ]
        plan.shape = rng.choice(shapes) if plan.chat and plan.stream else "last"
        plan.noise = rng.choice([0, 0, 0, 1, 3, 4, 12])
        plan.line_end = rng.choice(["\n", "\n", "\n", "\r", "\r\n"])
        plan.huge = rng.choices([0, 300_000, 1_000_000, 5_000_000], [60, 3, 2, 1])[0]
        plan.indent = rng.random() < 0.1
        plan.floats = rng.random() < 0.1
        if rng.random() < 0.04:
            plan.used = Used()
            plan.images = [Used() for _ in plan.images]

    def _limits(self, plan: Plan, body: dict[str, Any], right: list[str]) -> None:
        rng = self.rng
        names = ["max_output_tokens", "max_completion_tokens", "max_tokens"]
        if right and rng.random() < (0.3 if self.greedy else 0.6):
            plan.limit = rng.choice([16, 200, 1500])
            body[rng.choice(right)] = plan.limit
        wrong = [name for name in names if name not in right]
        if self.greedy or rng.random() < 0.4:
            body[rng.choice(wrong)] = 1

    def _dump(self, plan: Plan, body: dict[str, Any]) -> None:
        items = list(body.items())
        self.rng.shuffle(items)
        given = dict(items)
        indent = 1 if self.rng.random() < 0.2 else None
        plan.body = json.dumps(given, indent=indent, ensure_ascii=self.rng.random() < 0.5).encode()

    def _fill_chat(self, plan: Plan, plain: bool) -> None:
        rng = self.rng
        words = rng.choice([3, 20, 400, 3000])
        body: dict[str, Any] = {
            "model": plan.model,
            "messages": [{"role": "user", "content": text_of(rng, words)}],
            "stream": plan.stream,
        }
        if rng.random() < 0.2:
            plan.n = rng.randint(2, 4)
            body["n"] = plan.n
        if rng.random() < 0.3:
            body["service_tier"] = rng.choice(["auto", "default", "flex", "priority"])
        self._limits(plan, body, ["max_completion_tokens", "max_tokens"])
        options = "absent" if plain else rng.choice(OPTIONS)
        if options != "absent" and plan.stream:
            body["stream_options"] = options
        self._dump(plan, body)
        plan.asks = options == {"include_usage": True}
        plan.refused = plan.stream and options == {"include_usage": False}
        self._use_text(plan)

    def _use_text(self, plan: Plan) -> None:
        rng = self.rng
        into = rng.randint(1, max(1, len(plan.body) // 3)) + plan.history()
        out = (plan.limit if self.greedy else rng.randint(1, plan.limit)) * plan.n
        cached = rng.randint(0, into) if rng.random() < 0.5 else 0
        written = rng.randint(0, into - cached) if rng.random() < 0.3 else 0
        long = rng.randint(0, written) if plan.responds and rng.random() < 0.5 else 0
        thought = rng.randint(0, out) if rng.random() < 0.5 else 0
        plan.used = Used(into, cached, written, long, out, thought)

    def _fill_response(self, plan: Plan, plain: bool, over: str = "http") -> None:
        rng = self.rng
        body: dict[str, Any] = {
            "model": plan.model,
            "input": text_of(rng, rng.choice([3, 60, 2000])),
        }
        if plan.stream:
            body["stream"] = True
        if plan.responds:
            self._fill_options(plan, body, plain, over)
        self._dump(plan, body)
        self._use_text(plan)
        self._use_tools(plan)

    def _fill_options(self, plan: Plan, body: dict[str, Any], plain: bool, over: str) -> None:
        rng = self.rng
        if not plain and over == "http" and rng.random() < 0.25:
            plan.background = True
        if plan.background:
            body["background"] = True
            plan.polls = rng.choice([0, 1, 1, 2])
            plan.fate = rng.choices(["", "cancel", "lose"], [6, 3, 1])[0]
        elif rng.random() < 0.3:
            plan.store = False
            body["store"] = False
        if rng.random() < 0.3:
            body["service_tier"] = rng.choice(["auto", "default", "flex", "priority"])
        self._limits(plan, body, ["max_output_tokens"])
        if not plain:
            self._offer_tools(plan, body)
            self._chain(plan, body)
            if plan.store:
                self._visit(plan)

    def _visit(self, plan: Plan) -> None:
        rng = self.rng
        if plan.background:
            plan.visits = rng.choice([[], ["get"], ["get", "get"], ["get", "stream"]])
            if plan.fate == "cancel":
                plan.visits = ["get", "cancel"] if rng.random() < 0.7 else ["cancel"]
                plan.polls = 1_000_000
        elif rng.random() < 0.4:
            plan.visits = rng.choice([["get"], ["get", "delete"], ["stream"], ["items", "delete"]])

    def _offer_tools(self, plan: Plan, body: dict[str, Any]) -> None:
        rng = self.rng
        if rng.random() < 0.7:
            return
        plan.tools = rng.sample(
            ["web_search", "file_search", "code_interpreter", "image_generation"], rng.randint(1, 3)
        )
        given: list[dict[str, Any]] = [{"type": "function", "name": "f", "parameters": {}}]
        for tool in plan.tools:
            entry: dict[str, Any] = {"type": tool}
            if tool == "file_search":
                entry["vector_store_ids"] = []
            if tool == "code_interpreter":
                entry["container"] = {"type": "auto"}
            if tool == "image_generation" and rng.random() < 0.5:
                plan.image_model = entry["model"] = f"picture-{plan.number}"
            given.append(entry)
        body["tools"] = given
        plan.calls = rng.randint(1, 4)
        body["max_tool_calls"] = plan.calls

    def _chain(self, plan: Plan, body: dict[str, Any]) -> None:
        rng = self.rng
        earlier = [
            each
            for each in self.plans[-60:-1]
            if each.responds
            and each.store
            and not each.background
            and not each.fault
            and not each.refused
            and not each.foreign
            and "delete" not in each.visits
            and each.session == -1
            and "image_generation" not in each.tools
        ]
        if not earlier or rng.random() < 0.5:
            return
        before = rng.choice(earlier)
        body["previous_response_id"] = before.response_id
        plan.foreign = before.account != plan.account
        plan.refused = plan.refused or plan.foreign
        plan.builds_on = before

    def _use_tools(self, plan: Plan) -> None:
        rng = self.rng
        more, calls = {}, plan.calls
        for tool in plan.tools:
            count = rng.randint(0, calls) if tool != "code_interpreter" else min(calls, 1)
            calls -= count
            if tool == "web_search":
                more["searches"] = count
            if tool == "file_search":
                more["file_searches"] = count
            if tool == "code_interpreter":
                more["containers"] = count
            if tool == "image_generation" and count:
                into = rng.randint(1, plan.used.input)
                more |= {"drawn_input": into, "drawn_image_input": rng.randint(0, into)}
                more |= {"drawn_output": rng.randint(1, 4500)}
        plan.used = replace(plan.used, **more)

    def _fill_images(self, plan: Plan) -> None:
        rng = self.rng
        body: dict[str, Any] = {"model": plan.model, "prompt": text_of(rng, 20)}
        if rng.random() < 0.15:
            plan.model = ""
            del body["model"]
        if rng.random() < 0.5:
            plan.n = body["n"] = rng.randint(1, 4)
        if plan.stream:
            body |= {"stream": True, "partial_images": rng.randint(0, 3)}
        if rng.random() < 0.5:
            body["size"] = rng.choice(["1024x1024", "1536x1024", "auto"])
        plan.limit = 5000
        self._limits(plan, body, [])
        if plan.endpoint.endswith("edits"):
            plan.pictures = rng.randint(1, 3)
        if plan.endpoint.endswith("edits") and rng.random() < 0.5:
            self._dump_form(plan, body)
        else:
            picture = base64.b64encode(rng.randbytes(3000)).decode()
            if plan.pictures:
                body["images"] = [
                    {"image_url": f"data:image/png;base64,{picture}"} for _ in range(plan.pictures)
                ]
            self._dump(plan, body)
        each = [self._picture(plan) for _ in range(plan.n)]
        plan.used = sum(each, Used())
        plan.images = each if plan.stream else []

    def _picture(self, plan: Plan) -> Used:
        rng = self.rng
        text, seen = rng.randint(1, 5), plan.pictures * rng.randint(1, 100)
        drawn = plan.limit if self.greedy else rng.randint(1, 4000)
        return Used(input=text + seen, image_input=seen, output=drawn, image_output=drawn)

    def _dump_form(self, plan: Plan, body: dict[str, Any]) -> None:
        rng = self.rng
        if "n" in body and rng.random() < 0.15:
            body["n"] = rng.choice(["0010", "+2", "1_0", "2.0", " 2", "0"])
            plan.refused = True
        parts: list[tuple[str, str, bytes]] = [
            (name, "", json.dumps(value).strip('"').encode()) for name, value in body.items()
        ]
        parts += [("image[]", '; filename="a.png"', rng.randbytes(3000))] * plan.pictures
        rng.shuffle(parts)
        boundary = f"b{rng.getrandbits(64):x}"
        plan.headers["content-type"] = f"multipart/form-data; boundary={boundary}"
        plan.body = (
            b"".join(
                f"--{boundary}\r\nContent-Disposition: form-data; ".encode()
                + f'name="{name}"{more}\r\n\r\n'.encode()
                + value
                + b"\r\n"
                for name, more, value in parts
            )
            + f"--{boundary}--\r\n".encode()
        )

    def _session(self) -> list[Plan]:
        """Turns on one WebSocket: in lanes, or one after the other where something breaks."""
        rng, number = self.rng, self.sessions
        self.sessions += 1
        account = rng.choice(["prepaid", "open"])
        fault = rng.choice(["", "", "", "leave", "tear", "error", "never", "error_late"])
        lanes = [""]
        if not fault and rng.random() < 0.6:
            lanes = rng.choice([["", "a", "b"], ["a", "b"]])
        turns: list[Plan] = []
        for _ in range(rng.randint(1, 5)):
            plan = self._new("/responses", account)
            plan.session, plan.lane, plan.stream = number, rng.choice(lanes), True
            self._fill_response(plan, plain=False, over="websocket")
            plan.tier, plan.visits = rng.choice(["", "flex"]), []
            # One at most, where all lanes have names: an error without a lane is of its steering.
            may = "" not in lanes and not plan.foreign and not any(turn.steers for turn in turns)
            plan.steers = may and rng.random() < 0.7
            more: dict[str, Any] = {"type": "response.create", "user": str(plan.number)}
            if plan.lane:
                more["stream_id"] = plan.lane
            plan.body = json.dumps({**json.loads(plan.body), **more}).encode()
            plan.huge = rng.choices([0, 5_000_000], [15, 1])[0]
            plan.floats = rng.random() < 0.1
            plan.allowed = [plan.body]
            turns.append(plan)
        turns[-1].fault = fault if not turns[-1].refused else ""
        turns[-1].at = rng.random()
        return turns


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Event:
    """A piece of an answer. `known` is what has been reported once it is whole."""

    data: bytes
    text: int = 0  # bytes of output in it
    known: Used | None = None
    taken: bool = False  # the gateway asked for it and takes it out


HUGE = {
    300_000: json.dumps([f"word {n}" for n in range(25_000)]),
    1_000_000: json.dumps('A long text. \\ " {' * 60_000),
    5_000_000: json.dumps({f"p{n}": {"type": "string", "usage": None} for n in range(120_000)}),
}


class Answer:
    """What the upstream answers to a plan, as one text."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.text = b"".join(event.data for event in events)
        self.known: list[tuple[int, Used]] = []  # from which offset on what is reported
        self.texts: list[tuple[int, int]] = []
        at = 0
        for event in events:
            at += len(event.data)
            if event.known is not None:
                self.known.append((at, event.known))
            self.texts.append((at, event.text))

    def known_at(self, sent: int) -> Used | None:
        found = [used for at, used in self.known if at <= sent]
        return found[-1] if found else None

    def taken(self) -> tuple[int, int] | None:
        """From where to where the gateway takes it out."""
        at = 0
        for event in self.events:
            if event.taken:
                return at, at + len(event.data)
            at += len(event.data)
        return None


class Encoder:
    """Compresses an answer so that all that was sent can be decoded."""

    def __init__(self, name: str) -> None:
        self.name = name
        bits = {"gzip": 31, "deflate": 15, "raw": -15}.get(name)
        self._zlib = zlib.compressobj(1, zlib.DEFLATED, bits) if bits else None
        self._zstd = zstd.ZstdCompressor(1) if name == "zstd" else None
        self._brotli = brotli.Compressor(quality=1) if name == "br" else None

    @property
    def header(self) -> list[tuple[str, str]]:
        name = {"raw": "deflate"}.get(self.name, self.name)
        return [] if name == "identity" else [("content-encoding", name)]

    def part(self, text: bytes) -> bytes:
        if self._zlib:
            return self._zlib.compress(text) + self._zlib.flush(zlib.Z_SYNC_FLUSH)
        if self._zstd:
            return self._zstd.compress(text, zstd.ZstdCompressor.FLUSH_BLOCK)
        if self._brotli:
            return bytes(self._brotli.process(text) + self._brotli.flush())
        return text

    def end(self) -> bytes:
        if self._zlib:
            return self._zlib.flush()
        if self._zstd:
            return self._zstd.flush()
        return bytes(self._brotli.finish()) if self._brotli else b""


def numbers(value: Any, floats: bool) -> Any:
    """The same with integral floats in place of integers."""
    if isinstance(value, dict):
        return {name: numbers(each, floats) for name, each in value.items()}
    return float(value) if floats and type(value) is int else value


def chat_usage(used: Used, floats: bool = False) -> dict[str, Any]:
    usage = {
        "prompt_tokens": used.input,
        "completion_tokens": used.output,
        "total_tokens": used.input + used.output,
        "prompt_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": used.written},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning},
    }
    return dict(numbers(usage, floats))


def response_usage(used: Used, floats: bool = False) -> dict[str, Any]:
    short = used.written - used.written_12h
    kinds = {"ttl_30m_tokens": short, "ttl_12h_tokens": used.written_12h}
    details = {"cached_tokens": used.cached, "cache_write_tokens": used.written}
    usage = {
        "input_tokens": used.input,
        "input_tokens_details": {**details, "cache_write_tokens_details": kinds},
        "output_tokens": used.output,
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
        "total_tokens": used.input + used.output,
    }
    return dict(numbers(usage, floats))


def image_usage(used: Used, floats: bool = False, details: bool = True) -> dict[str, Any]:
    text = used.input - used.image_input
    usage: dict[str, Any] = {
        "input_tokens": used.input,
        "input_tokens_details": {"text_tokens": text, "image_tokens": used.image_input},
        "output_tokens": used.output,
        "total_tokens": used.input + used.output,
    }
    if details:
        shown = {"image_tokens": used.image_output, "text_tokens": used.output - used.image_output}
        usage["output_tokens_details"] = shown
    return dict(numbers(usage, floats))


def tool_usage(used: Used) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    if used.searches:
        found["web_search"] = {"num_requests": used.searches}
    if used.drawn_input or used.drawn_output:
        text = used.drawn_input - used.drawn_image_input
        found["image_gen"] = {
            "input_tokens": used.drawn_input,
            "input_tokens_details": {"text_tokens": text, "image_tokens": used.drawn_image_input},
            "output_tokens": used.drawn_output,
            "total_tokens": used.drawn_input + used.drawn_output,
        }
    return found or None


class Author:
    """Writes the answer to one plan. Only the plan's own chance is used, so that it is the same
    whatever happens at the same time."""

    def __init__(self, plan: Plan, asked: bool = False, injected: bool = False) -> None:
        self.plan = plan
        self.rng = random.Random(f"{plan.seed} answer")
        self.asked, self.injected = asked, injected
        self.reports = plan.fault != "never"
        self.words = [
            text_of(self.rng, self.rng.randint(1, 8)) for _ in range(self.rng.randint(1, 12))
        ]

    # Texts

    def _dump(self, value: Any) -> str:
        plan = self.plan
        text = json.dumps(value, indent=1 if plan.indent else None, ensure_ascii=False)
        return text.replace('"@huge@"', HUGE[plan.huge]) if plan.huge else text

    def _sse(self, value: Any, name: str = "", **more: Any) -> Event:
        end = self.plan.line_end
        lines = self._dump(value).split("\n")
        text = "".join(f"data: {line}{end}" for line in lines)
        text = (f"event: {name}{end}" if name else "") + text + end
        return Event(text.encode(), **more)

    def _noise(self) -> list[Event]:
        """What comes before the first event that says anything."""
        end, found = self.plan.line_end, []
        for number in range(self.plan.noise):
            kind = self.rng.randint(0, 3)
            if kind == 0:
                found.append(Event(f": PING{end}{end}".encode()))
            elif kind == 1:
                found.append(
                    self._sse({"type": "keepalive", "sequence_number": number}, "keepalive")
                )
            elif kind == 2 or not self.plan.chat:
                found.append(self._sse({"type": "ping"}, "ping"))
            else:
                azure = {"choices": [], "created": 0, "id": "", "model": "", "object": ""}
                found.append(self._sse({**azure, "prompt_filter_results": []}))
        return found

    def _shuffled(self, value: dict[str, Any]) -> dict[str, Any]:
        items = list(value.items())
        self.rng.shuffle(items)
        return dict(items)

    def answer(self) -> Answer:
        plan = self.plan
        if plan.stream:
            if plan.chat:
                return Answer(self._noise() + self._chat_events())
            if plan.draws:
                return Answer(self._noise() + self._image_events())
            named = [
                self._sse(value, value["type"], text=text, known=known)
                for value, text, known in self.response_events()
            ]
            return Answer(self._noise() + named)
        if plan.chat:
            return self.json(self._chat_object())
        if plan.draws:
            return self.json(self._image_object())
        if plan.endpoint.endswith("input_tokens"):
            tokens = {"object": "response.input_tokens", "input_tokens": plan.used.input}
            return Answer([Event(json.dumps(tokens).encode())])
        if plan.background:
            return self.json(self.response("queued"), reports=False)
        return self.json(self.response("completed"))

    def json(self, value: dict[str, Any], reports: bool | None = None) -> Answer:
        reports = self.reports if reports is None else reports
        text = "\n" * self.plan.noise + self._dump(self._shuffled(value))
        return Answer([Event(text.encode(), known=self.plan.used if reports else None)])

    # Chat

    def _chat_object(self) -> dict[str, Any]:
        plan = self.plan
        message = {"role": "assistant", "content": " ".join(self.words)}
        found: dict[str, Any] = {
            "id": f"chatcmpl-{plan.number}",
            "object": "chat.completion",
            "model": plan.model,
            "choices": [
                {"index": n, "message": message, "finish_reason": "stop"} for n in range(plan.n)
            ],
        }
        if plan.tier:
            found["service_tier"] = plan.tier
        if plan.huge:
            found["echo"] = "@huge@"
        if self.reports:
            found["usage"] = chat_usage(plan.used, plan.floats)
        return found

    def _chat_events(self) -> list[Event]:
        plan = self.plan
        base: dict[str, Any] = {
            "id": f"chatcmpl-{plan.number}",
            "object": "chat.completion.chunk",
            "model": plan.model,
        }
        if plan.tier:
            base["service_tier"] = plan.tier
        found = []
        reports = self.reports and (self.asked or plan.shape in ("every", "finish", "groq"))
        used = plan.used
        for number, word in enumerate(self.words):
            chunk = {
                **base,
                "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
            }
            known = None
            if reports and plan.shape == "every":
                known = Used(input=used.input, output=used.output * number // len(self.words))
                chunk["usage"] = chat_usage(known, plan.floats)
                known = known if known.output else None  # it may not be known yet
            elif self.asked:
                chunk["usage"] = None
            found.append(self._sse(chunk, text=len(word.encode()), known=known))
        found += self._chat_end(base, reports)
        return found

    def _chat_end(self, base: dict[str, Any], reports: bool) -> list[Event]:
        plan, end = self.plan, self.plan.line_end
        usage = chat_usage(plan.used, plan.floats) if reports else None
        finish: dict[str, Any] = {
            **base,
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        }
        if plan.huge:
            finish["echo"] = "@huge@"
        done = Event(f"data: [DONE]{end}{end}".encode())
        if plan.shape == "groq" and reports:
            finish["x_groq"] = {"id": "req_1", "usage": usage}
        elif plan.shape in ("finish", "every") and reports:
            finish["usage"] = usage
        if plan.shape in ("finish", "every", "groq") or not reports:
            known = plan.used if reports else None
            return [self._sse(self._shuffled(finish), known=known), done]
        extra = {**base, "usage": usage, "choices": []}
        if plan.shape == "null":
            extra["choices"] = None
        elif plan.shape == "absent":
            del extra["choices"]
        event = self._sse(self._shuffled(extra), known=plan.used, taken=self.injected)
        if plan.shape == "spaced":
            event.data = event.data.replace(b'"choices": []', b'"choices" : [ ]')
        last = [done, event] if plan.shape == "after_done" else [event, done]
        return [self._sse(finish), *last]

    # Images

    def _image_object(self) -> dict[str, Any]:
        plan = self.plan
        picture = base64.b64encode(self.rng.randbytes(900)).decode()
        found: dict[str, Any] = {"created": 1, "data": [{"b64_json": picture}] * plan.n}
        found |= {"size": "1024x1024", "quality": "low", "output_format": "png"}
        if plan.huge:
            found["echo"] = "@huge@"
        if self.reports:
            found["usage"] = image_usage(plan.used, plan.floats, self.rng.random() < 0.5)
        return found

    def _image_events(self) -> list[Event]:
        plan = self.plan
        kind = "image_edit" if plan.endpoint.endswith("edits") else "image_generation"
        found, total = [], Used()
        picture = base64.b64encode(self.rng.randbytes(900)).decode()
        for used in plan.images:
            image: dict[str, Any] = {"b64_json": picture, "size": "1024x1024", "quality": "low"}
            for number in range(self.rng.randint(0, 2)):
                partial = {"type": f"{kind}.partial_image", "partial_image_index": number, **image}
                found.append(self._sse(partial, partial["type"]))
            total += used
            last: dict[str, Any] = {"type": f"{kind}.completed", **image}
            if plan.huge:
                last["echo"] = "@huge@"
            if self.reports:
                last["usage"] = image_usage(used, plan.floats, self.rng.random() < 0.5)
            found.append(self._sse(last, last["type"], known=total if self.reports else None))
        return found

    # Responses

    def response(self, status: str, number: str = "", used: Used | None = None) -> dict[str, Any]:
        """The Response object in a state; with its output where it has ended."""
        plan = self.plan
        ended = status in ("completed", "incomplete")
        used = used or plan.used
        found: dict[str, Any] = {
            "id": plan.response_id + number,
            "object": "response",
            "status": status,
            "model": plan.model,
            "error": None,
            "output": self.items(number) if ended else [],
            "text": {"format": {"type": "json_schema", "schema": "@huge@" if plan.huge else {}}},
            "usage": response_usage(used, plan.floats) if ended and self.reports else None,
        }
        if plan.endpoint.endswith("compact"):
            found["object"] = "response.compaction"
        if plan.tier:
            found["service_tier"] = plan.tier
        if ended and self.reports and (tools := tool_usage(used)):
            found["tool_usage"] = tools
        return found

    def items(self, number: str = "") -> list[dict[str, Any]]:
        plan, used = self.plan, self.plan.used
        of = f"{plan.number}{number}"
        found: list[dict[str, Any]] = [
            {"id": f"ws_{of}_{n}", "type": "web_search_call", "status": "completed"}
            for n in range(used.searches)
        ]
        found += [
            {"id": f"fs_{of}_{n}", "type": "file_search_call", "status": "completed", "queries": []}
            for n in range(used.file_searches)
        ]
        found += [
            {
                "id": f"ci_{of}_{n}_{m}",
                "type": "code_interpreter_call",
                "container_id": f"cntr_{of}_{n}",
            }
            for n in range(used.containers)
            for m in range(2)
        ]
        if used.drawn_output:
            drawn = {"id": f"ig_{of}", "type": "image_generation_call", "status": "completed"}
            found.append(
                {**drawn, "result": base64.b64encode(b"picture" * 20).decode(), "size": "1024x1024"}
            )
        if used.reasoning:
            sealed = base64.b64encode(b"r" * min(9000, used.reasoning * 4)).decode()
            found.append(
                {"id": f"rs_{of}", "type": "reasoning", "summary": [], "encrypted_content": sealed}
            )
        content = [{"type": "output_text", "text": " ".join(self.words), "annotations": []}]
        message = {"id": f"msg_{of}", "type": "message", "role": "assistant", "status": "completed"}
        return [*found, {**message, "content": content}]

    def response_events(
        self, number: str = "", end: str = "completed", used: Used | None = None
    ) -> list[tuple[dict[str, Any], int, Used | None]]:
        """Events, the bytes of output in each, and what is known after it."""
        plan = self.plan
        used = used or plan.used
        first = "queued" if plan.background else "in_progress"
        found: list[tuple[dict[str, Any], int, Used | None]] = [
            ({"type": "response.created", "response": self.response(first, number)}, 0, None),
        ]
        items = self.items(number)
        for index, item in enumerate(items[:-1]):
            begun = {"id": item["id"], "type": item["type"], "status": "in_progress"}
            for kind, shown in (("added", begun), ("done", item)):
                event = {
                    "type": f"response.output_item.{kind}",
                    "output_index": index,
                    "item": shown,
                }
                found.append((event, 0, None))
        for word in self.words:
            delta = {
                "type": "response.output_text.delta",
                "item_id": items[-1]["id"],
                "delta": word,
            }
            found.append((delta, len(word.encode()), None))
        last = self.response(end, number, used)
        if end == "incomplete":
            last["incomplete_details"] = {"reason": "steered"}
        known = used if self.reports else None
        return [*found, ({"type": f"response.{end}", "response": self._shuffled(last)}, 0, known)]

    def error(self) -> bytes:
        """An error event."""
        error = {"message": "broken", "type": "server_error", "code": "server_error", "param": None}
        if self.plan.chat:
            return self._sse({"error": error}).data
        return self._sse({"type": "error", "error": error}, "error").data


# ── The upstream ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Entry:
    """What the upstream's ledger says of one answer."""

    plan: Plan
    name: str  # of the answer: the response's id
    used: Used = Used()  # what it bills
    known: Used | None = None  # what it has reported
    partly: bool = False  # and it would have reported more
    sure: bool = True  # the gateway has certainly received all that was sent
    steered: bool = False


@dataclass
class Stored:
    """A response that the upstream keeps."""

    plan: Plan
    entry: Entry
    status: str = "completed"
    polls: int = 0
    visited: int = 0


REMOVED = [
    (b'"stream_options":{"include_usage":true},', b""),
    (b'"include_usage":true,', b""),
    (b'"include_usage":true', b""),
    (b'{"include_usage":true}', b"null"),
    (b'"include_usage": true', b'"include_usage": null'),
    (b'"include_usage":true', b'"include_usage": null'),
]


class Simulation:
    """Plays the plans. `mode` is what it does when a client has left: "drain" goes on, "cancel"
    waits for the gateway to close, "short" sends filler until then."""

    def __init__(self) -> None:
        self.plans: dict[int, Plan] = {}
        self.entries: list[Entry] = []
        self.stored: dict[str, Stored] = {}
        self.mode = "drain"
        self.problems: list[str] = []
        self.ends = False  # all that is asked for now is whether it is there
        self.spoken: dict[int, list[bytes]] = {}  # messages of each WebSocket session

    # HTTP

    async def script(self, received: Received, reply: Reply) -> None:
        name = received.path.partition("?")[0].removeprefix("/v1/responses/")
        if name.startswith("resp_"):
            await self._visit(received, reply, name)
            return
        tag = received.header("x-client-request-id")
        if tag is None:
            await self._json(reply, 404, {"error": {"message": "unknown"}})
            return
        plan = self.plans[int(tag.removeprefix("t"))]
        plan.arrived.set()
        entry = Entry(plan, plan.response_id)
        self.entries.append(entry)
        injected = self._check(plan, received)
        await self._play(plan, entry, received, reply, injected)

    def _check(self, plan: Plan, received: Received) -> bool:
        """Whether the gateway asks for usage; the body is otherwise unchanged."""
        body = received.body
        if plan.refused:
            self.problems.append(f"{plan.number}: reached the upstream")
        if body in plan.allowed:
            return False
        may = plan.chat and plan.stream and not plan.asks and plan.sent is plan.body
        if not may or all(body.replace(a, b, 1) != plan.sent for a, b in REMOVED):
            self.problems.append(f"{plan.number}: other body {body[:300]!r} {plan.sent[:300]!r}")
        return True

    async def _json(self, reply: Reply, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        head = [("content-type", "application/json")]
        await reply.head(status, head, f"length:{len(text)}")
        await reply.send(text)

    async def _play(
        self, plan: Plan, entry: Entry, received: Received, reply: Reply, injected: bool
    ) -> None:
        if plan.fault == "status":
            plan.wire += b"?"
            await self._json(reply, plan.status, {"error": {"message": "no", "code": "x"}})
            return
        asked = injected or plan.asks
        author = Author(plan, asked, injected)
        answer = author.answer()
        entry.used = Used() if plan.endpoint.endswith("input_tokens") else plan.used
        if plan.fault == "error":
            entry.used = Used()
        if plan.fault == "early":
            await self._wait_for_leaving(plan, received, reply, b"")
        if plan.responds and (plan.store or plan.background) and plan.fault != "error":
            self.stored[plan.response_id] = Stored(
                plan, entry, "in_progress" if plan.background else "completed", plan.polls
            )
        await self._send(plan, entry, author, answer, received, reply)

    async def _wait_for_leaving(
        self, plan: Plan, received: Received, reply: Reply, filler: bytes
    ) -> None:
        """Until the client has left; then as the mode says."""
        plan.paused.set()
        await reply.wait(plan.left)
        if self.mode == "drain":
            return
        while filler and self.mode == "short":
            await reply.send(filler)
            await asyncio.sleep(0.05)
        await reply.wait(received.closed)
        raise Torn

    async def _send(
        self,
        plan: Plan,
        entry: Entry,
        author: Author,
        answer: Answer,
        received: Received,
        reply: Reply,
    ) -> None:
        encoder, text = Encoder(plan.encoding), answer.text
        broken = plan.fault in ("tear", "reset", "leave", "silent", "hang", "error_late")
        stop = int(len(text) * plan.at) if broken else len(text)
        if plan.fault == "error":
            stop = 0
        fills = plan.fault == "leave" and self.mode == "short"
        if plan.stream and (fills or plan.fault == "error_late"):  # at the end of an event
            stop = max([at for at, _ in answer.texts if at <= stop], default=0)
        label = [("content-type", plan.label)] if plan.label not in ("", "none") else []
        if not plan.label:
            label = [("content-type", "text/event-stream" if plan.stream else "application/json")]
        await reply.head(200, label + encoder.header, "chunked")
        if span := answer.taken():
            plan.taken = text[span[0] : span[1]] if plan.encoding == "identity" else b""
        start = 0
        for cut in [*self._cuts(plan, stop), stop]:
            await self._part(plan, entry, answer, encoder, reply, start, cut)
            start = cut
        if plan.fault == "error_late" and not shows_output(text[:stop]):
            entry.used = Used()
        if plan.fault in ("error", "error_late"):
            plan.wire += (part := encoder.part(author.error()))
            await reply.send(part)
        if plan.fault == "tear":
            reply.close()
        if plan.fault == "reset":
            entry.sure = False
            reply.tear()
        if plan.fault in ("silent", "hang"):
            plan.paused.set()
            await reply.wait(received.closed)
            raise Torn
        if plan.fault == "leave":
            entry.sure = self.mode == "drain"
            filler = b": filler\n\n" if plan.stream and plan.encoding == "identity" else b""
            await self._wait_for_leaving(plan, received, reply, filler)
            await self._part(plan, entry, answer, encoder, reply, stop, len(text))
        plan.wire += (end := encoder.end())
        await reply.send(end)
        if plan.stream and plan.background and stop == len(text):
            self.stored[plan.response_id].status = "completed"
        await reply.end()

    def _cuts(self, plan: Plan, stop: int) -> list[int]:
        rng = random.Random(f"{plan.seed} cuts")
        count = rng.choice([0, 1, 3, 10])
        return sorted(rng.randint(0, stop) for _ in range(count))

    async def _part(
        self,
        plan: Plan,
        entry: Entry,
        answer: Answer,
        encoder: Encoder,
        reply: Reply,
        start: int,
        end: int,
    ) -> None:
        if start < end:
            part = encoder.part(answer.text[start:end])
            plan.wire += part
            await reply.send(part)
        known = answer.known_at(end)
        if known is not None:
            entry.known, entry.partly = known, end < answer.known[-1][0]

    # Stored responses

    async def _visit(self, received: Received, reply: Reply, name: str) -> None:
        response_id, _, action = name.partition("/")
        stored = self.stored.get(response_id)
        if stored and self.ends:
            await self._json(reply, 200, {"id": response_id, "object": "response"})
            return
        if stored is None or (stored.plan.fate == "lose" and stored.plan.background):
            await self._json(reply, 404, {"error": {"message": "no such response", "code": None}})
            return
        if received.method == "DELETE":
            del self.stored[response_id]
            gone = {"id": response_id, "object": "response.deleted", "deleted": True}
            await self._json(reply, 200, gone)
        elif action == "cancel":
            await self._cancel(stored, reply)
        elif action == "input_items":
            item = {"id": f"msg_in_{stored.plan.number}", "type": "message", "role": "user"}
            await self._json(reply, 200, {"object": "list", "data": [{**item, "content": []}]})
        else:
            await self._show(stored, received, reply)

    async def _cancel(self, stored: Stored, reply: Reply) -> None:
        # Usage of 0 would be taken for that of its beginning.
        reports = random.Random(stored.plan.seed).random() < 0.4 and stored.plan.used != Used()
        stored.status = "cancelled"
        author = Author(stored.plan)
        value = author.response("cancelled")
        if reports:
            value["usage"] = response_usage(stored.plan.used)
            if tools := tool_usage(stored.plan.used):
                value["tool_usage"] = tools
            value["output"] = author.items()
            stored.entry.known = stored.plan.used
        await self._text(stored.plan, reply, author.json(value))

    async def _show(self, stored: Stored, received: Received, reply: Reply) -> None:
        plan, author = stored.plan, Author(stored.plan)
        if stored.status == "in_progress":
            stored.polls -= 1
            if stored.polls < 0 or (plan.fate == "cancel" and plan.done.is_set()):
                stored.status = "completed"
        value = author.response(stored.status)
        if stored.status == "in_progress":
            value["output"] = author.items()[-1:]  # what has been written so far
        if "stream=true" in received.path and stored.status == "completed":
            answer = replace_stream(plan, author)
        else:
            answer = author.json(value, reports=author.reports and stored.status == "completed")
        await self._text(plan, reply, answer, "stream=true" in received.path)
        known = answer.known_at(len(answer.text))
        if known is not None:
            stored.entry.known, stored.entry.sure = known, True

    async def _text(self, plan: Plan, reply: Reply, answer: Answer, stream: bool = False) -> None:
        encoder = Encoder(plan.encoding)
        label = "text/event-stream" if stream else "application/json"
        await reply.head(200, [("content-type", label), *encoder.header])
        await reply.send(encoder.part(answer.text))
        await reply.send(encoder.end())
        await reply.end()

    # WebSockets

    async def talk(self, sock: Socket) -> None:
        steers: dict[str, asyncio.Event] = {}
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                frame = await sock.recv()
                if frame["type"] == "response.steer":
                    steers[frame["previous_response_id"]].set()
                    continue
                plan = self.plans[int(frame["user"])]
                plan.arrived.set()
                if plan.refused:
                    self.problems.append(f"{plan.number}: reached the upstream")
                if sock.texts[-1] not in plan.allowed:
                    self.problems.append(f"{plan.number}: other message {sock.texts[-1][:300]!r}")
                steers[plan.response_id] = asyncio.Event()
                task = asyncio.create_task(self._take_turn(sock, plan, steers[plan.response_id]))
                running.add(task)
                task.add_done_callback(running.discard)
        finally:
            for task in running:
                task.cancel()
            for result in await asyncio.gather(*running, return_exceptions=True):
                if isinstance(result, Exception):
                    self.problems.append(f"a turn failed: {result!r}")

    async def _take_turn(self, sock: Socket, plan: Plan, steer: asyncio.Event) -> None:
        with contextlib.suppress(Torn, ConnectionError):
            await self._turn(sock, plan, steer)

    async def _turn(self, sock: Socket, plan: Plan, steer: asyncio.Event) -> None:
        author = Author(plan)
        lane = {"stream_id": plan.lane} if plan.lane else {}
        entry = Entry(plan, plan.response_id, Used() if plan.fault == "error" else plan.used)
        self.entries.append(entry)
        if plan.store and plan.fault != "error":
            self.stored[plan.response_id] = Stored(plan, entry)
        end = "incomplete" if plan.steers else "completed"
        events = author.response_events(end=end)
        stop = len(events)
        if plan.fault in ("leave", "tear", "error_late"):
            stop = 1 + int((len(events) - 2) * plan.at)
            shown = json.dumps([event for event, _, _ in events[:stop]]).encode()
            if plan.fault == "error_late" and not shows_output(shown):
                entry.used = Used()
        if plan.fault == "error":
            stop = 0
        for number, (event, _, known) in enumerate(events[:stop]):
            if plan.steers and number == len(events) - 1:
                while not steer.is_set() and not plan.left.is_set():
                    await asyncio.sleep(0.002)
                if not steer.is_set():  # it was refused
                    event, _, known = author.response_events()[-1]
            await self._say(sock, plan, author, {**event, **lane})
            entry.known = known if known is not None else entry.known
            await asyncio.sleep(0)
        await self._break_turn(sock, plan, author, lane, entry, events[stop:])
        if steer.is_set():
            await self._successor(sock, plan, author, lane)

    async def _break_turn(
        self,
        sock: Socket,
        plan: Plan,
        author: Author,
        lane: dict[str, str],
        entry: Entry,
        rest: list[tuple[dict[str, Any], int, Used | None]],
    ) -> None:
        if plan.fault in ("error", "error_late"):
            error = {"code": "server_error", "message": "broken"}
            await self._say(
                sock, plan, author, {"type": "error", "status": 500, "error": error, **lane}
            )
        if plan.fault == "tear":
            sock.tear()
        if plan.fault == "leave":
            plan.paused.set()
            while not plan.left.is_set():
                await asyncio.sleep(0.002)
            for event, _, known in rest if self.mode == "drain" else []:
                await self._say(sock, plan, author, {**event, **lane})
                entry.known = known if known is not None else entry.known

    async def _successor(
        self, sock: Socket, plan: Plan, author: Author, lane: dict[str, str]
    ) -> None:
        used = Used(input=plan.used.input, output=min(plan.limit, 7))
        entry = Entry(plan, f"{plan.response_id}s", used, steered=True)
        self.entries.append(entry)
        for event, _, known in author.response_events("s", used=used):
            event = json.loads(json.dumps(event))
            if response := event.get("response"):
                response["output"] = []
                response.pop("tool_usage", None)
            if "item" in event:
                continue
            await self._say(sock, plan, author, {**event, **lane})
            entry.known = known

    async def _say(self, sock: Socket, plan: Plan, author: Author, event: dict[str, Any]) -> None:
        text = author._dump(event).encode()
        self.spoken.setdefault(plan.session, []).append(text)
        await sock.send(text)


def shows_output(text: bytes) -> bool:
    """Whether there is anything in it that a model has made, or a search that it has begun."""
    marks = (b'"delta"', b"output_item.done", b"_image", b"web_search_call", b"file_search_call")
    return any(mark in text for mark in marks)


def replace_stream(plan: Plan, author: Author) -> Answer:
    """The stream of a response that has ended, once more."""
    return Answer(
        [
            author._sse(value, value["type"], text=text, known=known)
            for value, text, known in author.response_events()
        ]
    )
