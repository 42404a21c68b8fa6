"""Measures the gateway beside nginx, each proxy alone on one core, in one run: CPU for a JSON
request and for a streamed event, time from start to first answer, resident memory.

    make bench

Upstream and load share the other core. CPU is the proxy processes' own (user and system), read from
the operating system before and after; what a ratio says is steadier than any single number.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from gateway import Gateway, free_port, wait_until  # noqa: E402

PROXY_CORE, LOAD_CORE = {0}, {1}
BODY = b'{"model":"m","input":"' + b"x" * 300 + b'"}'
STREAM_BODY = b'{"model":"m","stream":true,"input":"x"}'
USAGE = b'{"input_tokens":10,"output_tokens":5}'
ANSWER = b'{"id":"resp_1","object":"response","model":"m","output":[],"usage":' + USAGE + b"}"
EVENT = (
    b"event: response.output_text.delta\n"
    b'data: {"type":"response.output_text.delta","item_id":"msg_1","output_index":0,'
    b'"content_index":0,"delta":" word","sequence_number":1}\n\n'
)
NGINX = """
daemon off; pid nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3;
  uwsgi_temp_path t4; scgi_temp_path t5;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048; keepalive_requests 1000000;
    location / {{
      proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


class FastUpstream(asyncio.Protocol):
    """Answers JSON at once, and a stream with events at a steady pace until the proxy leaves."""

    events_a_second = 20.0
    streams: set[FastUpstream] = set()  # noqa: RUF012

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""

    def connection_lost(self, _: Exception | None) -> None:
        self.streams.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        lowered = head.lower()
        length = int(lowered.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if len(body) < length:
            return
        self.buffer = b""
        if b'"stream":true' in body:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            self.streams.add(self)
        else:
            head = (
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            )
            self.transport.write(head % len(ANSWER) + ANSWER)

    def emit(self, event: bytes) -> None:
        self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))

    @classmethod
    async def pace(cls) -> None:
        """Each stream has its own moment within the interval, as real ones do."""
        ticks, due = 20, time.monotonic()
        while True:
            for tick in range(ticks):
                for number, stream in enumerate(list(cls.streams)):
                    if number % ticks == tick:
                        stream.emit(EVENT)
                due = max(due + 1 / cls.events_a_second / ticks, time.monotonic() - 0.1)
                await asyncio.sleep(max(0, due - time.monotonic()))


def head(key: str, body: bytes) -> bytes:
    return (
        f"POST /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def read_answer(reader: asyncio.StreamReader) -> None:
    got = await reader.readuntil(b"\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200"), got
    length = got.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    if length:
        await reader.readexactly(int(length))
    else:
        await reader.readuntil(b"0\r\n\r\n")


def cpu_of(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def rss_of(processes: list[psutil.Process]) -> float:
    return sum(process.memory_info().rss for process in processes) / (1 << 20)


async def json_requests(
    port: int, key: str, seconds: float, clients: int = 16
) -> tuple[int, list[float]]:
    """How many answers came, and their latencies."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.monotonic()) < end:
            writer.write(head(key, BODY))
            await read_answer(reader)
            latencies.append(time.monotonic() - started)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(latencies), sorted(latencies)


class Reading(asyncio.Protocol):
    """A client of a stream that counts events."""

    events = 0

    def __init__(self, key: str) -> None:
        self._key = key

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(head(self._key, STREAM_BODY))

    def data_received(self, data: bytes) -> None:
        Reading.events += data.count(b"\n\n")


async def open_streams(port: int, key: str, count: int) -> list[asyncio.Transport]:
    """Open streams until there are `count`."""
    loop = asyncio.get_running_loop()
    opened = []
    for _ in range(count - len(FastUpstream.streams)):
        transport, _ = await loop.create_connection(lambda: Reading(key), "127.0.0.1", port)
        opened.append(transport)
    patience = time.monotonic() + 30
    while len(FastUpstream.streams) < count and time.monotonic() < patience:
        await asyncio.sleep(0.05)
    assert len(FastUpstream.streams) == count, "all streams are open"
    return opened


async def measure(
    name: str, port: int, key: str, processes: list[psutil.Process], seconds: float, many: int
) -> dict[str, float]:
    FastUpstream.events_a_second = 20.0
    figures = {"memory, idle (MiB)": rss_of(processes)}
    await json_requests(port, key, 1)
    before = cpu_of(processes)
    done, _ = await json_requests(port, key, seconds)
    figures["CPU a JSON request (µs)"] = (cpu_of(processes) - before) / done * 1e6
    _, alone = await json_requests(port, key, seconds / 2, clients=1)
    figures["latency alone, median (ms)"] = alone[len(alone) // 2] * 1e3
    streams = await open_streams(port, key, 300)
    await asyncio.sleep(1)
    before, events = cpu_of(processes), Reading.events
    await asyncio.sleep(seconds)
    passed = Reading.events - events
    figures["CPU a streamed event (µs)"] = (cpu_of(processes) - before) / passed * 1e6
    figures["events a second"] = passed / seconds
    FastUpstream.events_a_second = 2.0  # memory, not speed
    streams += await open_streams(port, key, many)
    await asyncio.sleep(1)
    figures[f"memory, {many} streams (MiB)"] = rss_of(processes)
    for transport in streams:
        transport.abort()
    while FastUpstream.streams:
        await asyncio.sleep(0.05)
    print(f"measured {name}", file=sys.stderr)
    return figures


def start_nginx(folder: Path, upstream: int) -> tuple[subprocess.Popen[bytes], int]:
    folder.mkdir()
    port = free_port()
    (folder / "nginx.conf").write_text(NGINX.format(upstream=upstream, port=port))
    path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert path, "nginx is not installed"
    process = subprocess.Popen([path, "-p", folder, "-c", "nginx.conf"])
    wait_until(lambda: answers(port))
    return process, port


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def start_gateway(folder: Path, upstream: int) -> tuple[Gateway, float]:
    """The gateway with everything switched on, and the seconds from start to first answer."""
    settings = "[limits.account]\nconcurrency = 0\nrequests_per_minute = 1000000000\n"
    gateway = Gateway(folder, f"http://127.0.0.1:{upstream}/v1", settings)
    gateway.cli("account", "add", "bench")
    started = time.monotonic()
    gateway.start(wait=False)
    while not first_answer(gateway.port):
        time.sleep(0.002)
    return gateway, time.monotonic() - started


def first_answer(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
            return sock.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def pinned(process: psutil.Process) -> list[psutil.Process]:
    """The process with its children, all on the proxy's core."""
    processes = [process, *process.children(recursive=True)]
    for each in processes:
        for thread in each.threads():
            os.sched_setaffinity(thread.id, PROXY_CORE)
    return processes


async def main(seconds: float, many: int) -> None:
    os.sched_setaffinity(0, LOAD_CORE)
    server = await asyncio.get_running_loop().create_server(
        FastUpstream, "127.0.0.1", 0, backlog=2048
    )
    upstream = server.sockets[0].getsockname()[1]
    pacing = asyncio.create_task(FastUpstream.pace())
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        nginx, port = start_nginx(Path(folder) / "nginx", upstream)
        try:
            run = measure("nginx", port, "x", pinned(psutil.Process(nginx.pid)), seconds, many)
            results["nginx"] = await run
        finally:
            nginx.terminate()
            nginx.wait()
        gateway, to_first_answer = start_gateway(Path(folder) / "gateway", upstream)
        try:
            key = gateway.new_key("bench")
            processes = pinned(psutil.Process(gateway.pid))
            results["RedBTC"] = await measure("RedBTC", gateway.port, key, processes, seconds, many)
        finally:
            gateway.kill()
    pacing.cancel()
    server.close()
    print_table(results, to_first_answer)


def print_table(results: dict[str, dict[str, float]], to_first_answer: float) -> None:
    print(f"{'':32}{'nginx':>10}{'RedBTC':>10}{'ratio':>8}")
    for figure, of_nginx in results["nginx"].items():
        ours = results["RedBTC"][figure]
        print(f"{figure:32}{of_nginx:10.2f}{ours:10.2f}{ours / of_nginx:8.1f}")
    print(f"{'start to first answer (s)':32}{'':10}{to_first_answer:10.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="for each measurement")
    parser.add_argument("--streams", type=int, default=1000, help="for the memory's measurement")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.streams))
