"""Measures what a proxy costs: nginx, this gateway and LiteLLM, each alone on one core, in front of
one fast upstream, with the load on the other core. All run at the same time and take turns, since
the speed of a shared machine drifts: what counts is the ratio in one run. See README.md beside.

    make bench
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import os
import platform
import re
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.helpers.gateway import Gateway, free_port, wait_until  # noqa: E402

PROXY_CORE, LOAD_CORE = {0}, {1}
PATH = "/v1/chat/completions"
MESSAGES = b'"messages":[{"role":"user","content":"%s"}]}'
JSON_BODY = b'{"model":"m",' + MESSAGES % (b"x" * 250)
LARGE_BODY = b'{"model":"m",' + MESSAGES % (b"word " * 210_000)
STREAM_BODY = b'{"model":"m","stream":true,"stream_options":{"include_usage":true},'
STREAM_BODY += MESSAGES % b"x"
USAGE = b'"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}}'
ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hello there!"},"finish_reason":"stop"}],' + USAGE
)
CHUNK = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
EVENT = CHUNK + b'"choices":[{"index":0,"delta":{"content":" %.6f"},"finish_reason":null}]}\n\n'
LAST = CHUNK + b'"choices":[],' + USAGE + b"\n\ndata: [DONE]\n\n"
SENT_AT = re.compile(rb'"content": ?" (\d+\.\d{6})"')
NGINX = """
daemon off; pid nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3;
  uwsgi_temp_path t4; scgi_temp_path t5; client_max_body_size 100m; client_body_buffer_size 2m;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048; keepalive_requests 1000000;
    location = /healthz {{ return 200; }}
    location / {{
      proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
LITELLM_KEY = "sk-" + secrets.token_hex(32)
LITELLM = """
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{upstream}/v1", api_key: x}}
general_settings: {{master_key: {key}}}
"""


# The upstream and the load, in this process


class Upstream(asyncio.Protocol):
    """Answers JSON at once, and a stream with events at a steady pace until told to end it."""

    streams: set[Upstream] = set()  # noqa: RUF012
    events_a_second = 20.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = bytearray()

    def connection_lost(self, _: Exception | None) -> None:
        self.streams.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(self.buffer) < end + 4 + length:
            return
        body, self.buffer = bytes(self.buffer[end + 4 : end + 200]), bytearray()
        if b'"stream":true' in body or b'"stream": true' in body:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            self.streams.add(self)
        else:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (len(ANSWER), ANSWER)
            )

    def emit(self, event: bytes) -> None:
        self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))

    @classmethod
    def end_all(cls) -> None:
        for stream in list(cls.streams):
            stream.emit(LAST)
            stream.transport.write(b"0\r\n\r\n")
        cls.streams.clear()

    @classmethod
    async def pace(cls) -> None:
        """Each stream has its own moment within the interval, as real ones do."""
        ticks, due = 40, time.monotonic()
        while True:
            for tick in range(ticks):
                for stream in list(cls.streams)[tick::ticks]:
                    stream.emit(EVENT % time.monotonic())
                due = max(due + 1 / cls.events_a_second / ticks, time.monotonic() - 0.1)
                await asyncio.sleep(max(0, due - time.monotonic()))


def head(key: str, body: bytes) -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def requests(
    port: int, key: str, seconds: float, clients: int = 16, body: bytes = JSON_BODY
) -> list[float]:
    """Requests one after the other from each client; their latencies, sorted."""
    latencies: list[float] = []
    end = time.monotonic() + seconds
    request = head(key, body)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.monotonic()) < end:
            writer.write(request)
            got = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert got.startswith(b"http/1.1 200"), got
            length = got.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await (reader.readexactly(int(length)) if length else reader.readuntil(b"0\r\n\r\n"))
            latencies.append(time.monotonic() - started)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return sorted(latencies)


class Reading(asyncio.Protocol):
    """A client of a stream that notes how long each event took."""

    latencies: list[float] = []  # noqa: RUF012
    done = 0

    def __init__(self, request: bytes) -> None:
        self._request = request

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        for sent in SENT_AT.findall(data):
            Reading.latencies.append(now - float(sent))
        if b"[DONE]" in data:
            Reading.done += 1
            self.transport.close()


@contextlib.asynccontextmanager
async def streams(port: int, key: str, count: int) -> Any:
    """So many open streams, which all end cleanly."""
    loop = asyncio.get_running_loop()
    request = head(key, STREAM_BODY)
    Reading.done = 0
    for _ in range(count):
        await loop.create_connection(lambda: Reading(request), "127.0.0.1", port)
    await until(lambda: len(Upstream.streams) == count, "all streams are open")
    yield
    Upstream.end_all()
    await until(lambda: Reading.done == count, "all streams have ended")


async def poll() -> None:
    """Never sleep: else a proxy is charged for waking the load, the more the slower it is."""
    while True:
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


# The proxies


class Proxy:
    """One that is measured: where it listens, and its processes, all on the proxies' core."""

    gateway: Gateway | None = None  # where it is one of ours

    def __init__(self, name: str, port: int, key: str, pid: int, started: float) -> None:
        self.name, self.port, self.key = name, port, key
        wait_until(self._answers, 120, f"for {name}")
        self.start_seconds = time.monotonic() - started
        process = psutil.Process(pid)
        self.processes = [process, *process.children(recursive=True)]
        for each in self.processes:
            for thread in each.threads():
                os.sched_setaffinity(thread.id, PROXY_CORE)
        self.idle_memory = self.memory()
        self._suspend()

    def _suspend(self) -> None:
        for each in self.processes:
            each.suspend()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While this one is measured the others stand still."""
        for each in self.processes:
            each.resume()
        yield
        self._suspend()

    def _answers(self) -> bool:
        path = "/health/liveliness" if self.name == "LiteLLM" else "/healthz"
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.settimeout(5)
                sock.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
                return sock.recv(100).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def cpu(self) -> float:
        """Seconds of user and system time so far, exact to the nanosecond (proc(5), schedstat)."""
        stats = [
            file.read_text()
            for process in self.processes
            for file in Path(f"/proc/{process.pid}/task").glob("*/schedstat")
        ]
        return sum(int(stat.split()[0]) for stat in stats) / 1e9

    def memory(self) -> float:
        """Resident MiB."""
        return sum(int(process.memory_info().rss) for process in self.processes) / (1 << 20)


@contextlib.contextmanager
def process(*command: str, folder: Path, **env: str) -> Iterator[int]:
    """A command's process, killed at the end with its children."""
    with (folder / "log").open("ab") as log:
        running = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **env}
        )
    try:
        yield running.pid
    finally:
        for each in [*psutil.Process(running.pid).children(recursive=True), running]:
            each.kill()
        running.wait()


@contextlib.contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[Proxy]:
    path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert path, "nginx is not installed"
    port, started = free_port(), time.monotonic()
    (folder / "nginx.conf").write_text(NGINX.format(upstream=upstream, port=port))
    with process(path, "-p", str(folder), "-c", "nginx.conf", folder=folder) as pid:
        yield Proxy("nginx", port, "x", pid, started)


@contextlib.contextmanager
def litellm(folder: Path, upstream: int) -> Iterator[Proxy]:
    """In an environment of its own, kept for the next time."""
    home = ROOT / ".venv-litellm"
    if not (home / "ready").exists():
        print("installing LiteLLM …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        file = ROOT / "bench" / "litellm.txt"
        subprocess.run([home / "bin" / "pip", "install", "-qq", "-r", file], check=True)
        (home / "ready").touch()
    port, started = free_port(), time.monotonic()
    (folder / "config.yaml").write_text(LITELLM.format(upstream=upstream, key=LITELLM_KEY))
    command = [str(home / "bin" / "litellm"), "--config", "config.yaml", "--port", str(port)]
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    env = {"PATH": path, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    with process(*command, "--host", "127.0.0.1", folder=folder, **env) as pid:
        yield Proxy("LiteLLM", port, LITELLM_KEY, pid, started)


@contextlib.contextmanager
def redbtc(
    folder: Path, upstream: int, name: str = "RedBTC", *, rows: int = 0, root: Path = ROOT
) -> Iterator[Proxy]:
    """The gateway with everything switched on, out of the checkout `root`."""
    settings = "[limits]\nrequests_per_minute = 1000000000\n"
    settings += "[limits.account]\nconcurrency = 100000\ntokens_per_minute = 1000000000\n"
    settings += '[billing]\ndefault_credit_limit = "1000000"\n'
    # The commands below compile the code, as the first start of an installation does.
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    url = f"http://127.0.0.1:{upstream}/v1"
    gateway = Gateway(folder, url, settings, root=root, **bytecode)
    key = gateway.new_key("bench")
    gateway.run("price", "add", "m", "--input", "1.25", "--cached-input", "0.125", "--output", "10")
    if rows:
        fill(gateway.database, rows)
    started = time.monotonic()
    gateway.start(wait=False)
    try:
        proxy = Proxy(name, gateway.port, key, gateway.pid, started)
        proxy.gateway = gateway
        yield proxy
    finally:
        gateway.kill()


FIRST = 1_760_000_000_000  # the large ledger's first request, in October 2025
COMES_SETTLED = "a_request_comes_settled"


def fill(database: Path, rows: int, accounts: int = 10_000) -> None:
    """A ledger of a year: so many rows, of so many accounts with a key each, and two models."""
    counted = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) "
    pause = 365 * 86_400_000 // rows
    schema = (ROOT / "schema.sql").read_text()
    tables = ("usage_by_day", "usage_by_month", "traffic_by_day")
    by_day, *others = (
        re.findall(rf"INSERT INTO {table}[^;]*SELECT[^;]*GROUP BY[^;]*;", schema)[0]
        for table in tables
    )
    with contextlib.closing(sqlite3.connect(database)) as ledger:
        (trigger,) = ledger.execute(
            "SELECT sql FROM sqlite_schema WHERE name = ?", (COMES_SETTLED,)
        ).fetchone()
        ledger.executescript(
            "PRAGMA synchronous = OFF; PRAGMA cache_size = -500000; BEGIN;"
            + "INSERT INTO acting VALUES (1, 'bench', 1);"
            + "INSERT INTO accounts (id, name, created_at) "
            + counted.format(accounts)
            + "SELECT printf('acct_%d', i), printf('account %d', i), 1 FROM n;"
            + "INSERT INTO keys (id, hash, account_id, created_at) "
            + counted.format(accounts)
            + "SELECT printf('key_%d', i), randomblob(32), printf('acct_%d', i), 1 FROM n;"
            + f"DROP TRIGGER {COMES_SETTLED};"  # all at once is faster than one by one
            + "INSERT INTO requests (request_id, account_id, key_id, endpoint, model,"
            + " requested_model, upstream, started_at, first_byte_ms, duration_ms, status, outcome,"
            + " usage_source, input_tokens, output_tokens, cost, month) "
            + counted.format(rows)
            + f"SELECT printf('req_%012x%020x', {FIRST} + i * {pause}, i),"
            f" printf('acct_%d', i * 7919 % {accounts} + 1), printf('key_%d', i * 7919 % {accounts}"
            f" + 1), '{PATH}', 'm' || i % 2, 'm' || i % 2, 'test', {FIRST} + i * {pause}, 5, 9,"
            " 200, 'completed', 'upstream', 10, 5, 62500,"
            f" strftime('%Y-%m', ({FIRST} + i * {pause}) / 1000, 'unixepoch') FROM n;"
            + by_day
            + "UPDATE usage_by_day SET cost_nanos = 62500 * requests;"
            + "".join(others)
            + "DELETE FROM acting;"
            + f"{trigger};"
            + "COMMIT;"
        )


# The measurements


class Figures:
    """What was measured, by figure and by proxy, as often as it was."""

    def __init__(self, proxies: list[Proxy]) -> None:
        self._proxies = [proxy.name for proxy in proxies]
        self._values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, figure: str, proxy: Proxy, value: float) -> None:
        self._values[figure][proxy.name].append(value)

    def median(self, figure: str, name: str) -> float | None:
        values = sorted(self._values[figure][name])
        return values[len(values) // 2] if values else None

    def table(self) -> str:
        """Medians, with the ratio to nginx behind."""
        width = 19
        lines = ["".ljust(36) + "".join(name.rjust(width) for name in self._proxies)]
        for figure in self._values:
            line, base = figure.ljust(36), self.median(figure, "nginx")
            for name in self._proxies:
                value = self.median(figure, name)
                text = "–" if value is None else f"{value:.2f}"
                if value is None or not base or name == "nginx" or "added" in figure:
                    text += " " * 9
                else:
                    text += f" ({value / base:5.1f}×)"
                line += text.rjust(width)
            lines.append(line.rstrip())
        return "\n".join(lines)


def at(latencies: list[float], share: float) -> float:
    """Milliseconds, of sorted seconds."""
    return latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1e3


async def cost_of(
    proxy: Proxy, seconds: float, body: bytes = JSON_BODY, clients: int = 16
) -> float:
    """CPU microseconds a request."""
    await requests(proxy.port, proxy.key, seconds / 10, clients, body)
    before = proxy.cpu()
    done = await requests(proxy.port, proxy.key, seconds, clients, body)
    return (proxy.cpu() - before) / len(done) * 1e6


async def measure_requests(
    proxies: list[Proxy], figures: Figures, direct: int, rounds: int, seconds: float
) -> None:
    for _ in range(rounds):
        straight = await requests(direct, "x", seconds / 4, 1)
        for proxy in proxies:
            with proxy.alone():
                figures.add("CPU a JSON request (µs)", proxy, await cost_of(proxy, seconds))
                one = await requests(proxy.port, proxy.key, seconds / 2, 1)
                large = await cost_of(proxy, seconds / 2, LARGE_BODY, 2)
            for share, name in ((0.5, "median"), (0.99, "99 %")):
                added = at(one, share) - at(straight, share)
                figures.add(f"latency added, alone, {name} (ms)", proxy, added)
            figures.add("CPU a request of 1 MB (ms)", proxy, large / 1e3)


async def measure_streams(
    proxies: list[Proxy], figures: Figures, count: int, seconds: float, what: str
) -> None:
    """`count` streams at 20 events a second each."""
    for proxy in proxies:
        with proxy.alone():
            async with streams(proxy.port, proxy.key, count):
                await asyncio.sleep(1)
                Reading.latencies = []
                before, started = proxy.cpu(), time.monotonic()
                await asyncio.sleep(seconds)
                while not Reading.latencies:  # on a slow machine, in a short run
                    await asyncio.sleep(seconds)
                used, events = proxy.cpu() - before, sorted(Reading.latencies)
                each = (proxy.memory() - proxy.idle_memory) * 1024 / count
                rate = len(events) / (time.monotonic() - started)
        figures.add(f"{what}: CPU an event (µs)", proxy, used / len(events) * 1e6)
        figures.add(f"{what}: events a second", proxy, rate)
        figures.add(f"{what}: latency, 99 % (ms)", proxy, at(events, 0.99))
        if count == 1000 and not figures.median(f"{what}: memory each (KiB)", proxy.name):
            figures.add(f"{what}: memory each (KiB)", proxy, each)


def measure_reports(proxy: Proxy, figures: Figures, rounds: int) -> None:
    """What people look at, from the Unix socket, with the client's share."""
    month = {"since": "2026-05-01", "until": "2026-06-01"}
    one = {"account": "account 4711"}
    day_and_model = {"group_by": "day,model"}
    reports: dict[str, tuple[str, dict[str, str]]] = {
        "all, a month by day, model": ("/usage", month | day_and_model),
        "all, 40 hours by model": (
            "/usage",
            {"since": "2026-05-01T07:00", "until": "2026-05-02T23:00", "group_by": "model"},
        ),
        "one account, a year by day, model": ("/usage", one | day_and_model),
        "one account, its 100 newest": ("/requests", one | {"limit": "100"}),
        "one account's statement": ("/accounts/account 4711/statements/2026-05", {}),
    }
    assert proxy.gateway
    with proxy.alone():
        for _ in range(rounds):
            for name, (path, query) in reports.items():
                started = time.monotonic()
                proxy.gateway.api("GET", path, **query)
                figures.add(f"{name} (ms)", proxy, (time.monotonic() - started) * 1000)


OPERATORS = ("overview", "accounts", "accounts?search=47", "prices", "notices", "log", "users")
ACCOUNTS = (
    *("", "/keys", "/usage", "/usage?model=m0&since=2026-05-01", "/billing"),
    *("/billing/2026-05", "/members", "/notices", "/manage"),
)
PAGES_A_SECOND = (0, 2, 20)


class Pages:
    """All pages of the dashboard on the large ledger, as an operator opens them."""

    def __init__(self, gateway: Gateway) -> None:
        link = gateway.api("POST", "/users", {"email": "a@b.c", "role": "operator"})["link"]
        password = secrets.token_urlsafe(16)
        form = {"password": password, "again": password}
        with httpx2.Client(base_url=gateway.url, headers={"origin": gateway.url}) as client:
            client.post(urlsplit(link).path, data=form)
            self._cookie = f"redbtc={client.cookies['redbtc']}"
        self._port = gateway.port
        account = gateway.api("GET", "/accounts/account 4711")["id"]
        self.paths = [*OPERATORS, *(f"accounts/{account}{end}" for end in ACCOUNTS)]

    async def open(self, path: str) -> float:
        """Seconds until it is there whole."""
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"GET /dashboard/{path} HTTP/1.1\r\nhost: a\r\ncookie: {self._cookie}\r\n"
        writer.write(f"{head}connection: close\r\n\r\n".encode())
        page = await reader.read()
        assert page.startswith(b"HTTP/1.1 200"), page[:200]
        writer.close()
        return time.monotonic() - started

    async def keep_opening(self, rate: int) -> None:
        """One after the other, so many a second."""
        async with asyncio.TaskGroup() as opening:
            for path in itertools.cycle(self.paths):
                opening.create_task(self.open(path))
                await asyncio.sleep(1 / rate)


async def measure_pages(proxy: Proxy, figures: Figures, rounds: int, seconds: float) -> None:
    """How long pages take, and what is in flight while they are drawn."""
    assert proxy.gateway
    with proxy.alone():
        pages = Pages(proxy.gateway)
        first = sorted([await pages.open(path) for path in pages.paths])
        figures.add("pages, each the first time, slowest (ms)", proxy, first[-1] * 1e3)
        for _ in range(rounds):
            took = sorted([await pages.open(path) for path in pages.paths])
            figures.add("pages, median (ms)", proxy, at(took, 0.5))
            figures.add("pages, slowest (ms)", proxy, took[-1] * 1e3)
        for _ in range(rounds):
            for rate in PAGES_A_SECOND:
                what = f", {rate} pages/s" if rate else ""
                drawing = asyncio.create_task(pages.keep_opening(rate)) if rate else None
                async with streams(proxy.port, proxy.key, 300):
                    await asyncio.sleep(1)
                    Reading.latencies = []
                    await asyncio.sleep(seconds)
                    events = sorted(Reading.latencies)
                one = await requests(proxy.port, proxy.key, seconds, 1)
                if drawing:
                    drawing.cancel()
                    await asyncio.wait([drawing])
                for share, name in ((0.5, "median"), (0.99, "99 %")):
                    figures.add(f"an event{what}, {name} (ms)", proxy, at(events, share))
                    figures.add(f"a request{what}, {name} (ms)", proxy, at(one, share))


async def main(arguments: argparse.Namespace) -> None:
    os.sched_setaffinity(0, LOAD_CORE)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", 0, backlog=2048)
    upstream = server.sockets[0].getsockname()[1]
    background = [asyncio.create_task(each) for each in (Upstream.pace(), poll())]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("nginx", "LiteLLM"):
            (folder / name).mkdir()
        proxies = [
            stack.enter_context(nginx(folder / "nginx", upstream)),
            stack.enter_context(redbtc(folder / "RedBTC", upstream)),
        ]
        for number, root in enumerate(arguments.against):
            other = redbtc(
                folder / f"{number}", upstream, f"{number + 1}: {root.name}"[:18], root=root
            )
            proxies.append(stack.enter_context(other))
        if arguments.rows:
            large = redbtc(folder / "large", upstream, "RedBTC, large", rows=arguments.rows)
            proxies.append(stack.enter_context(large))
        slow = []
        if arguments.litellm:
            slow.append(stack.enter_context(litellm(folder / "LiteLLM", upstream)))
        figures = Figures(proxies + slow)
        for proxy in proxies + slow:
            figures.add("memory, idle (MiB)", proxy, proxy.idle_memory)
            if proxy.name != "nginx":
                figures.add("start to first answer (s)", proxy, proxy.start_seconds)
        rounds, seconds = arguments.rounds, arguments.seconds
        for _ in range(rounds):
            await measure_streams(proxies, figures, 1000, seconds, "1000 streams")
            await measure_streams(proxies, figures, 300, seconds, "300 streams")
            await measure_streams(slow, figures, 20, seconds, "20 streams")
        await measure_requests(proxies + slow, figures, upstream, rounds, seconds)
        if arguments.rows:
            measure_reports(proxies[-1], figures, rounds)
            await measure_pages(proxies[-1], figures, rounds, seconds)
        for task in background:
            task.cancel()
        server.close()
        version = f"Python {platform.python_version()}, {os.cpu_count()} cores"
        print(f"{datetime.date.today()}, {version}, medians of {rounds} rounds\n")
        print(figures.table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="of all, taking turns")
    parser.add_argument("--rows", type=int, default=5_000_000, help="of the large ledger; 0: none")
    parser.add_argument("--no-litellm", dest="litellm", action="store_false")
    parser.add_argument(
        "--against", metavar="DIR", type=Path, action="append", default=[], help="a checkout, too"
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(parser.parse_args()))
