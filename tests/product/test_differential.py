"""The gateway's ledger against that of a simulated upstream (tests/helpers/simulated.py): random
requests over every endpoint, transport, encoding, option and fault.

What was reported is billed to the nano; what was not reported costs something where the client got
bytes of an answer, and not more than it could; bytes are those that the upstream sent; no row stays
pending, no prepaid balance is ever below 0, and stored responses are their owner's alone.

REDBTC_REQUESTS and REDBTC_SEED make it longer and vary it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway, wait_until
from tests.helpers.simulated import (
    DEFAULT_IMAGE_MODEL,
    PRICES,
    Drawing,
    Entry,
    Plan,
    Simulation,
    nanos,
)
from tests.helpers.upstream import Upstream

pytestmark = [pytest.mark.promise_2, pytest.mark.promise_8]

REQUESTS = int(os.environ.get("REDBTC_REQUESTS", "300"))
SEED = os.environ.get("REDBTC_SEED", "1")
MODES = ("drain", "cancel", "short")
METERING = {
    "drain": {"drain_seconds": 600},
    "cancel": {"on_disconnect": "cancel"},
    "short": {"drain_seconds": 1},
}
AT_ONCE = 8
HANGS = 2 * PATIENCE_SECONDS  # for one part of the requests
PENDING = 60  # seconds for background responses to be seen to end
ENOUGH = 10**9  # nanos: what most requests can cost
MUCH = "10"  # what all of them can cost
BROKEN = ("tear", "reset", "leave", "silent")


class Result:
    """What a client got."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False
        self.texts: list[bytes] = []  # of a WebSocket session

    @property
    def code(self) -> str:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(json.loads(self.body)["error"]["code"])
        return ""


class Run:
    """The clients, and what they got."""

    def __init__(self, gateway: Gateway, simulation: Simulation, drawing: Drawing) -> None:
        self.gateway, self.simulation, self.drawing = gateway, simulation, drawing
        self.rng = random.Random(f"{drawing.seed} run")
        self.keys: dict[str, str] = {}
        self.results: dict[int, Result] = {}
        self.visits: list[tuple[Plan, str, Result]] = []
        self.killed: set[int] = set()
        self.differences: list[str] = []
        self.payments = 0

    def differs(self, plan: Plan, text: str) -> None:
        what = f"{plan.endpoint} {plan.fault or 'whole'} {'stream ' * plan.stream}{plan.shape}"
        more = f"{plan.encoding} {plan.label} noise {plan.noise} huge {plan.huge}"
        self.differences.append(f"{plan.number} [{what} {more}]: {text}")

    # One request

    async def http(
        self,
        account: str,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        plan: Plan | None = None,
    ) -> Result:
        """Send a request on a connection of its own. With a plan the client may leave."""
        result = Result()
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.gateway.port, limit=1 << 22
        )
        lines = {"host": "g", "authorization": f"Bearer {self.keys[account]}", **(headers or {})}
        chunked = plan is not None and plan.chunked
        lines |= {"transfer-encoding": "chunked"} if chunked else {"content-length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        writer.write(f"{method} /v1{path} HTTP/1.1\r\n{head}\r\n".encode() + sent)
        reading = asyncio.create_task(self._read(reader, result, plan))
        try:
            if plan and plan.fault in ("leave", "early"):
                await self._leave(plan, reading)
            else:
                await asyncio.wait_for(reading, PATIENCE_SECONDS)
        finally:
            reading.cancel()
            writer.close()
            await asyncio.gather(reading, return_exceptions=True)
            if plan:
                plan.left.set()
        return result

    async def _leave(self, plan: Plan, reading: asyncio.Task[None]) -> None:
        while not plan.paused.is_set() and not reading.done():
            await asyncio.sleep(0.002)
        await asyncio.wait({reading}, timeout=0.1)

    async def _read(self, reader: asyncio.StreamReader, result: Result, plan: Plan | None) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head[:-4].decode("latin-1").split("\r\n")
            result.headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines)}
            result.status = int(first.split()[1])
            if "content-length" in result.headers:
                left = int(result.headers["content-length"])
                while left:
                    part = await reader.read(min(left, 65536))
                    if not part:
                        return
                    result.body += part
                    left -= len(part)
            else:
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    await self._chunk(reader, result, size)
                    if plan and plan.fault == "at_end" and has_ended(plan, result.body):
                        return
            result.complete = True

    async def _chunk(self, reader: asyncio.StreamReader, result: Result, size: int) -> None:
        while size:
            part = await reader.read(min(size, 65536))
            if not part:
                raise ConnectionError
            result.body += part
            size -= len(part)
        await reader.readexactly(2)

    async def request(self, plan: Plan) -> None:
        headers = {**plan.headers, "x-client-request-id": f"t{plan.number}"}
        result = await self.http(plan.account, "POST", plan.endpoint, plan.sent, headers, plan)
        self.results[plan.number] = result
        if result.code == "insufficient_quota":
            await self._pay()
        if result.status == 200 and result.complete and not plan.fault.startswith("error"):
            for action in plan.visits:
                await self._visit(plan, action)

    async def _visit(self, plan: Plan, action: str) -> None:
        method = {"delete": "DELETE", "cancel": "POST"}.get(action, "GET")
        more = {"cancel": "/cancel", "stream": "?stream=true", "items": "/input_items"}
        path = f"/responses/{plan.response_id}{more.get(action, '')}"
        result = await self.http(plan.account, method, path)
        if result.code == "insufficient_quota":  # for what it can have used beyond the estimate
            await self._pay(MUCH)
            result = await self.http(plan.account, method, path)
        self.visits.append((plan, action, result))
        if result.status != 200 and plan.fate != "lose":
            self.differs(plan, f"{action} by its owner is {result.status} {result.body[:200]!r}")

    async def look(self, plans: list[Plan]) -> None:
        """Look at stored responses whose streams broke off, which shows what they used."""
        for plan in plans:
            result = self.results.get(plan.number)
            seen = result is not None and f'"{plan.response_id}"'.encode() in result.body
            stored = plan.stream and plan.response_id in self.simulation.stored
            if seen and stored and plan.fault in BROKEN:
                await self._visit(plan, "get")

    async def _pay(self, amount: str = "") -> None:
        """Pay a little, so that the balance stays near to zero, or this amount."""
        api, path = self.gateway.api, "/accounts/prepaid"
        if amount or nanos((await asyncio.to_thread(api, "GET", path))["balance"]) < ENOUGH:
            amount = amount or f"{self.rng.choice([0.2, 0.5, 1.0]):.1f}"
            await asyncio.to_thread(api, "POST", f"{path}/payments", {"amount": amount})

    async def _balance(self, plan: Plan) -> None:
        account = await asyncio.to_thread(self.gateway.api, "GET", "/accounts/prepaid")
        if account["balance"].startswith("-"):
            self.differs(plan, f"the prepaid balance is {account['balance']}")

    # A WebSocket session

    async def session(self, turns: list[Plan]) -> None:
        result = Result()
        for plan in turns:
            self.results[plan.number] = result
        url = f"ws://127.0.0.1:{self.gateway.port}/v1/responses"
        headers = {"authorization": f"Bearer {self.keys[turns[0].account]}"}
        try:
            async with connect(
                url,
                additional_headers=headers,
                proxy=None,
                max_size=None,
                open_timeout=None,
                ping_interval=None,
                close_timeout=1,
            ) as connection:
                await self._talk(connection, turns, result)
        except (ConnectionClosed, InvalidHandshake, OSError) as error:
            if not any(p.fault for p in turns):
                self.differs(turns[0], f"the session broke: {error!r}")
        for plan in turns:
            plan.left.set()

    async def _talk(self, connection: Any, turns: list[Plan], result: Result) -> None:
        first, last = (turns[:-1], turns[-1:]) if turns[-1].fault else (turns, [])
        for group in (first, last):
            open_turns = list(group)
            for plan in group:
                await connection.send(plan.body.decode())
            while open_turns:
                receiving = asyncio.create_task(connection.recv(decode=False))
                while not receiving.done():
                    await asyncio.wait({receiving}, timeout=0.005)
                    if last and group is last and last[0].paused.is_set():
                        await asyncio.wait({receiving}, timeout=0.05)
                        if not receiving.done():
                            receiving.cancel()
                            connection.transport.abort()
                            last[0].left.set()
                            return
                text = await receiving
                result.texts.append(text)
                await self._take(connection, text, open_turns)

    async def _take(self, connection: Any, text: bytes, open_turns: list[Plan]) -> None:
        event = json.loads(text)
        kind, lane = event["type"], event.get("stream_id", "")
        if kind == "error":
            steering = [p for p in open_turns if p.steers and p.paused.is_set()]
            if steering and not lane and not steering[0].left.is_set():
                steering[0].left.set()
                return
            plan = next((p for p in open_turns if p.lane == lane), open_turns[0])
            open_turns.remove(plan)
            if event.get("error", {}).get("code") == "insufficient_quota":
                await self._pay()
            return
        for plan in list(open_turns):
            if (
                plan.steers
                and event.get("item_id") == f"msg_{plan.number}"
                and not plan.paused.is_set()
            ):
                plan.paused.set()
                steer = {"type": "response.steer", "previous_response_id": plan.response_id}
                await connection.send(json.dumps({**steer, "input": "more"}))
            if kind in ("response.completed", "response.incomplete"):
                end = plan.response_id + "s" * (plan.steers and not plan.left.is_set())
                if event["response"]["id"] == end:
                    open_turns.remove(plan)

    # All of them

    async def all(self, drawn: list[list[Plan]]) -> None:
        waiting, ended = asyncio.Semaphore(AT_ONCE), set()

        async def one(plans: list[Plan]) -> None:
            async with waiting:
                for plan in plans:
                    before = plan.builds_on
                    while before and not before.done.is_set():
                        await asyncio.sleep(0.002)
                try:
                    if plans[0].session >= 0:
                        await self.session(plans)
                    else:
                        await self.request(plans[0])
                finally:
                    for plan in plans:
                        plan.done.set()
                if plans[0].account == "prepaid":
                    await self._balance(plans[0])
                ended.add(plans[0].number)

        try:
            async with asyncio.timeout(HANGS):
                await asyncio.gather(*map(one, drawn))
        except TimeoutError:
            begun = [(p.number, p.endpoint, p.fault) for (p, *_) in drawn if p.number not in ended]
            raise AssertionError(f"seed {self.drawing.seed}: {begun} did not end") from None

    async def rush(self, drawn: list[list[Plan]]) -> None:
        """Send these at once when little is left."""
        api, path = self.gateway.api, "/accounts/prepaid"
        available = nanos((await asyncio.to_thread(api, "GET", path))["available"])
        left = self.rng.randint(10**7, 2 * 10**8)
        amount = f"{(left - available) / 10**9:.9f}"
        body = {"amount": amount, "reason": "for a test"}
        await asyncio.to_thread(api, "POST", f"{path}/payments", body)
        await self.all(drawn)

    async def kill(self, plans: list[Plan]) -> None:
        """Kill the gateway in the middle of these."""
        tasks = [asyncio.create_task(self.request(plan)) for plan in plans]
        for plan in plans:
            self.killed.add(plan.number)
            while not plan.paused.is_set():
                await asyncio.sleep(0.002)
        await asyncio.to_thread(self.gateway.kill)
        await asyncio.gather(*tasks)


def has_ended(plan: Plan, body: bytes | bytearray) -> bool:
    """Whether the event that ends the answer is in it."""
    if plan.chat:
        return b"[DONE]" in body
    kinds = re.findall(rb'"type": ?"(?:response|image_\w+)\.completed"', body)
    return len(kinds) >= max(1, len(plan.images))


# ── What must hold ───────────────────────────────────────────────────────────────────────────────


class Judge:
    """Compares the gateway's ledger with the upstream's."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows = run.gateway.rows()
        self.entries: dict[int, list[Entry]] = {}
        for entry in run.simulation.entries:
            self.entries.setdefault(entry.plan.number, []).append(entry)
        self.exact = {"upstream": 0, "gateway": 0}

    def judge(self) -> None:
        by_model: dict[str, list[dict[str, Any]]] = {}
        by_id = {row["request_id"]: row for row in self.rows}
        for row in self.rows:
            by_model.setdefault(row["requested_model"] or "", []).append(row)
        for plan in self.run.drawing.plans:
            result = self.run.results.get(plan.number)
            if result is None:
                continue
            rows = by_model.get(plan.model, [])
            if not plan.model:
                named = by_id.get(result.headers.get("x-redbtc-request-id", ""))
                rows = [named] if named else []
            self._judge_status(plan, result)
            self._judge_bytes(plan, result)
            self._judge_rows(plan, result, rows)
        for texts in self.run.simulation.problems:
            self.run.differences.append(texts)

    def _judge_status(self, plan: Plan, result: Result) -> None:
        if plan.session >= 0:
            return
        allowed = {200} if plan.fault != "status" else {plan.status}
        if plan.refused:
            allowed = {400, 404} if plan.foreign else {400}
        if plan.account == "prepaid" and result.code == "insufficient_quota":
            allowed = {429}
        before = plan.builds_on
        if before and before.response_id.encode() not in self.run.results[before.number].body:
            allowed |= {400, 404}
        if plan.fault in ("leave", "early", "hang", "at_end"):
            allowed |= {0}
        if plan.fault in ("tear", "reset", "silent"):
            allowed |= {502, 504}
        if result.status not in allowed:
            self.run.differs(plan, f"status {result.status} {bytes(result.body[:200])!r}")

    def _judge_bytes(self, plan: Plan, result: Result) -> None:
        if plan.session >= 0 or result.status != 200:
            return
        expected = [bytes(plan.wire)]
        if plan.taken:
            expected = [expected[0].replace(plan.taken, b"", 1)]
            if plan.shape == "after_done":
                expected.append(bytes(plan.wire))
        broken = plan.fault in ("tear", "reset", "silent", "hang")
        body = bytes(result.body)
        if not broken and result.complete and body not in expected:
            place = next(
                (n for n, (a, b) in enumerate(zip(body, expected[0], strict=False)) if a != b), -1
            )
            near = [each[max(0, place - 40) : place + 80] for each in (body, expected[0])]
            self.run.differs(
                plan, f"other bytes: {len(body)} of {len(expected[0])}, at {place} {near}"
            )
        if not any(each.startswith(body) for each in expected):
            self.run.differs(plan, f"bytes are no prefix: {len(body)} of {len(expected[0])}")
        if broken and result.complete and plan.shape != "after_done":  # torn after its end
            self.run.differs(plan, "a torn answer looks whole")
        if not (broken or result.complete or plan.fault in ("leave", "early", "at_end")):
            self.run.differs(plan, f"the answer is torn: {len(body)} of {len(expected[0])}")

    def _judge_rows(self, plan: Plan, result: Result, rows: list[dict[str, Any]]) -> None:
        entries = self.entries.get(plan.number, [])
        for row in rows:
            if row["outcome"] == "pending":
                self.run.differs(plan, "the row is still pending")
        if not entries:
            for row in rows:
                if nanos(row["cost"] or "0"):
                    self.run.differs(
                        plan, f"nothing reached the upstream, yet it costs {row['cost']}"
                    )
            return
        left = list(rows)
        for entry in entries:
            named = [row for row in left if row["response_id"] == entry.name]
            fitting = named or [row for row in left if not row["response_id"]] or left
            found = fitting[0] if fitting else None
            if found:
                left.remove(found)
            self._judge_entry(plan, entry, result, found)
        if left:
            self.run.differs(plan, f"{len(left)} more rows than the upstream has: {left}")

    def _judge_entry(
        self, plan: Plan, entry: Entry, result: Result, row: dict[str, Any] | None
    ) -> None:
        got = self._got(plan, entry, result)
        bill = plan.cost(entry.used)
        if row is None:
            findable = plan.model or result.headers  # else nothing tells which row is its
            if findable and (got or (entry.known and entry.sure)):
                self.run.differs(plan, f"no row, billed {bill}")
            return
        cost = nanos(row["cost"] or "0")
        exact = entry.known is not None and self._equal(plan, entry.known, row)
        if entry.known is not None:
            if exact:
                self.exact["upstream"] += plan.cost(entry.known)
                self.exact["gateway"] += cost
                return
            killed = plan.number in self.run.killed and row["outcome"] == "interrupted"
            partly = entry.partly and plan.cost(entry.known) <= cost
            if entry.sure and not killed and not partly:
                source = row["usage_source"]
                wrong = self._wrong(plan, entry.known, row)
                self.run.differs(
                    plan, f"reported, but the row is {source} {row['outcome']}: {wrong}"
                )
                return
        if plan.number in self.run.killed and not plan.background:
            return
        self._judge_estimate(plan, entry, result, row, got, bill, cost)

    def _judge_estimate(
        self,
        plan: Plan,
        entry: Entry,
        result: Result,
        row: dict[str, Any],
        got: int,
        bill: int,
        cost: int,
    ) -> None:
        most = plan.most(more_input=entry.used.input if entry.steered else 0)
        names = ("usage_source", "outcome", "cost", "input_tokens", "output_tokens")
        state = ", ".join(str(row[name]) for name in names)
        if cost > most:
            self.run.differs(plan, f"costs {cost}, at most {most}: {state}")
        if not bill:
            failed = plan.fault.startswith("error") and entry.used != plan.used
            if cost and (failed or plan.endpoint.endswith("input_tokens")):
                self.run.differs(plan, f"the upstream bills nothing: {state}")
            return
        if got and (row["usage_source"] == "none" or not cost):
            self.run.differs(plan, f"{got} bytes for nothing, billed {bill}: {state}")
        # What passed in the last second before a kill is not kept.
        if got and row["usage_source"] == "estimated" and plan.number not in self.run.killed:
            for name, seen in self._seen(plan, result).items():
                if (row.get(name) or 0) < seen:
                    self.run.differs(plan, f"{name} of {seen} were seen: {row.get(name)}, {state}")

    def _got(self, plan: Plan, entry: Entry, result: Result) -> int:
        if plan.session >= 0:
            name = f'"{entry.name}"'.encode()
            return sum(len(text) for text in result.texts if name in text)
        return len(result.body) if result.status == 200 else 0

    def _seen(self, plan: Plan, result: Result) -> dict[str, int]:
        """What the client could read of what was used, as far as that is easily known."""
        shown = b"\n".join([bytes(result.body), *self._visited(plan)])
        if plan.session >= 0 or plan.encoding != "identity" or plan.indent:
            return {}
        if plan.draws:
            return {"image_output_tokens": int(b".completed" in shown)}

        def said(kind: bytes, text: bytes) -> int:
            found = re.findall(rb'"%b": ?"((?:[^"\\]|\\.)*)"' % kind, text)
            return sum(len(json.loads(b'"%b"' % each).encode()) for each in found)

        texts = [bytes(result.body), *self._visited(plan)]
        said_most = max(
            said(kind, text) for text in texts for kind in (b"delta", b"content", b"text")
        )
        sealed = set(re.findall(rb'"encrypted_content": ?"([^"]*)"', shown))
        tokens = said_most // 4 + sum(map(len, sealed)) * 3 // 16

        def done(kind: bytes) -> int:
            items = re.findall(rb'"id": ?"(%b_[^"]*)"[^{}]*"status": ?"completed"' % kind, shown)
            return len(set(items))

        return {
            "output_tokens": min(tokens, plan.limit * plan.n),
            "web_searches": done(b"ws"),
            "file_searches": done(b"fs"),
            "image_output_tokens": done(b"ig"),
            "containers": len(set(re.findall(rb'"container_id": ?"([^"]*)"', shown))),
        }

    def _visited(self, plan: Plan) -> list[bytes]:
        """The longest that its owner was shown of the response afterwards."""
        found = [
            bytes(each.body)
            for of, action, each in self.run.visits
            if of is plan and action == "get"
        ]
        return sorted(found, key=len)[-1:]

    def _equal(self, plan: Plan, known: Any, row: dict[str, Any]) -> bool:
        return not self._wrong(plan, known, row)

    def _wrong(self, plan: Plan, known: Any, row: dict[str, Any]) -> str:
        fields = {"usage_source": "upstream", **known.fields()}
        wrong = [
            f"{name} {row.get(name)} for {value}"
            for name, value in fields.items()
            if (row.get(name) or 0) != value
        ]
        cost = plan.cost(known)
        if nanos(row["cost"] or "0") != cost:
            wrong.append(f"cost {row['cost']} for {cost / 10**9:.9f}")
        return ", ".join(wrong)


def judge_sessions(run: Run) -> None:
    """Messages are those that the upstream sent, besides the gateway's own errors."""
    for number, sent in run.simulation.spoken.items():
        turns = [plan for plan in run.drawing.plans if plan.session == number]
        texts = run.results[turns[0].number].texts
        known = set(sent)
        got = [text for text in texts if text in known or json.loads(text)["type"] != "error"]
        if got != sent[: len(got)] or (len(got) < len(sent) and not any(p.fault for p in turns)):
            run.differs(turns[0], f"other messages: {len(got)} of {len(sent)}")


async def judge_owners(run: Run) -> None:
    """What was shown is its owner's, and nobody else's."""
    run.simulation.ends = True
    deleted = {plan.number for plan, action, _ in run.visits if action == "delete"}
    for plan in run.drawing.plans:
        result = run.results.get(plan.number)
        shown = f'"{plan.response_id}"'.encode()
        if (
            result is None
            or plan.number in deleted
            or (plan.number in run.killed and not plan.background)
        ):
            continue
        if plan.response_id not in run.simulation.stored:
            continue
        if not (shown in result.body or any(shown in text for text in result.texts)):
            continue
        own = await run.http(plan.account, "GET", f"/responses/{plan.response_id}")
        if own.status != 200:
            run.differs(plan, f"its owner doesn't find it: {own.status} {bytes(own.body[:150])!r}")
        other = "open" if plan.account == "prepaid" else "prepaid"
        foreign = await run.http(other, "GET", f"/responses/{plan.response_id}")
        if foreign.status != 404:
            run.differs(plan, f"the other account finds it: {foreign.status}")


def judge_books(run: Run) -> None:
    """The statement is the sum of the rows, and nothing is held or in flight."""
    gateway = run.gateway
    rows = gateway.rows()
    for name in ("prepaid", "open"):
        account = gateway.api("GET", f"/accounts/{name}")
        cost = sum(nanos(row["cost"] or "0") for row in rows if row["account"] == name)
        months = gateway.api("GET", f"/accounts/{name}/statements")["months"]
        stated = 0
        for month in months:
            statement = gateway.api("GET", f"/accounts/{name}/statements/{month['month']}")
            stated += nanos(statement["totals"]["cost"])
        if stated != cost:
            run.differences.append(f"{name}: statements {stated}, rows {cost}")
        if float(account["held"]):
            run.differences.append(f"{name}: still holds {account['held']}")
        if name == "prepaid" and account["balance"].startswith("-"):
            run.differences.append(f"the prepaid balance is {account['balance']}")
    if not gateway.api("POST", "/db/check")["ok"]:
        run.differences.append("the database is damaged")


# ── The test ─────────────────────────────────────────────────────────────────────────────────────


def settings(upstream: Upstream, mode: str) -> dict[str, Any]:
    table = {"base_url": upstream.url, "api_key_env": "TEST_UPSTREAM_KEY"}
    most = ["chat-*", "resp-*", "picture-*", DEFAULT_IMAGE_MODEL]
    return {
        "server": {},
        "database": {"synchronous": "normal"},
        "limits": {"queue_seconds": 100, "account": {"concurrency": 1000, "background": 1000}},
        "metering": METERING[mode],
        "billing": {"unpriced_models": "refuse"},
        "upstreams": [
            {"name": "usual", "models": most, **table},
            {"name": "slow", "models": ["slow-*"], "idle_timeout_seconds": 1, **table},
        ],
    }


def start(gateway: Gateway) -> dict[str, str]:
    """Start it with prices and two accounts; their keys."""
    gateway.start()
    gateway.api("POST", "/prices", {"prices": PRICES})
    gateway.api("POST", "/accounts", {"name": "prepaid", "credit_limit": "0"})
    gateway.api("POST", "/accounts/prepaid/payments", {"amount": "0.5"})
    gateway.api("POST", "/accounts", {"name": "open"})
    return {name: gateway.new_key(name) for name in ("prepaid", "open")}


def play(run: Run, upstream: Upstream, requests: int) -> None:
    """All requests, in a part for each mode, with the gateway killed between them."""
    gateway, simulation, drawing = run.gateway, run.simulation, run.drawing
    for number, mode in enumerate(MODES):
        simulation.mode = mode
        gateway.configure(settings(upstream, mode))
        if number:
            gateway.start()
        else:
            run.keys = start(gateway)
        before, drawn = len(drawing.plans), []
        while len(drawing.plans) - before < requests // len(MODES):
            drawn.append(drawing.draw())
        rushes = [[drawing.rush() for _ in range(AT_ONCE)] for _ in range(requests // 100)]
        hanging = [drawing.hanging(kind) for kind in ("chat", "responses", "background")]
        simulation.plans = {plan.number: plan for plan in drawing.plans}
        asyncio.run(run.all(drawn))
        for rush in rushes:
            asyncio.run(run.rush(rush))
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        asyncio.run(run.look(drawing.plans[before:]))
        if mode != MODES[-1]:
            asyncio.run(run.kill([plan for (plan,) in hanging]))


def test_the_ledger_is_that_of_the_upstream(make_gateway: MakeGateway, upstream: Upstream) -> None:
    simulation = Simulation()
    upstream.script, upstream.talk = simulation.script, simulation.talk
    gateway = make_gateway(settings(upstream, MODES[0]))
    run = Run(gateway, simulation, Drawing(SEED))
    play(run, upstream, REQUESTS)
    with contextlib.suppress(AssertionError):  # the judge names those that stay so
        wait_until(lambda: all(row["outcome"] != "pending" for row in gateway.rows()), PENDING)
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    judge = Judge(run)
    judge.judge()
    judge_sessions(run)
    judge_books(run)
    asyncio.run(judge_owners(run))
    assert judge.exact["gateway"] == judge.exact["upstream"]
    text = "\n".join(run.differences)
    assert not run.differences, f"seed {SEED}: {len(run.differences)} differences\n{text}"
