"""CORS for pages of other origins, and the openai package in a browser page."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from tests.helpers.gateway import NO_TLS, Gateway, MakeGateway, wait_until
from tests.helpers.tools import NODE_MODULES, needs
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    openai_like,
    response_pieces,
    ws_like_openai,
)

pytestmark = pytest.mark.promise_7

ORIGIN = "https://app.example"
ASKED = "authorization,content-type,x-stainless-lang,idempotency-key,x-never-heard-of"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": ASKED,
}
READABLE = ["x-request-id", "x-redbtc-request-id", "retry-after", "retry-after-ms"]
RESPONSE = {"model": "gpt-up", "input": "Hi"}


def client_of(gateway: Gateway, **headers: str) -> httpx2.Client:
    return httpx2.Client(base_url=gateway.base_url, headers=headers, verify=NO_TLS, trust_env=False)


def cors_of(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if "access-control" in name}


def test_a_preflight_needs_no_key(gateway: Gateway) -> None:
    for path in ("/v1/responses", "/v1/models", "/v1/responses/resp_1/cancel", "/v1/unknown"):
        with client_of(gateway, **PREFLIGHT) as client:
            answer = client.options(f"{gateway.url}{path}")
        assert (answer.status_code, answer.content) == (204, b"")
        assert not {"content-length", "transfer-encoding", "content-type"} & {*answer.headers}
        assert answer.headers["access-control-allow-origin"] == "*"
        methods = answer.headers["access-control-allow-methods"].split(", ")
        assert {"GET", "POST", "DELETE"} <= {*methods}
        assert answer.headers["access-control-allow-headers"] == ASKED
        assert int(answer.headers["access-control-max-age"]) > 0
        vary = answer.headers["vary"].lower()
        assert "origin" in vary
        assert "access-control-request-headers" in vary
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("missing", ["origin", "access-control-request-method"])
def test_what_is_no_preflight_is_not_served(gateway: Gateway, missing: str) -> None:
    headers = {name: value for name, value in PREFLIGHT.items() if name != missing}
    with client_of(gateway, **headers) as client:
        assert client.options("/responses").status_code == 405
        assert client.options("/files").status_code == 404


@pytest.mark.parametrize(
    "path", ["/admin/v1/me", "/dashboard/", "/metrics", "/status", "/healthz", "/readyz", "/v1"]
)
def test_nothing_else_is_for_other_origins(gateway: Gateway, path: str) -> None:
    with client_of(gateway) as client:
        for answer in (
            client.options(f"{gateway.url}{path}", headers=PREFLIGHT),
            client.get(f"{gateway.url}{path}", headers={"origin": ORIGIN}),
        ):
            assert not cors_of(answer)


def answers(gateway: Gateway, upstream: Upstream, **headers: str) -> Iterator[httpx2.Response]:
    """Yield a response of each kind under /v1."""
    key, narrow = gateway.new_key(), gateway.new_key("narrow", requests_per_minute=1)
    with client_of(gateway, authorization=f"Bearer {key}", **headers) as client:
        yield client.post("/responses", json=RESPONSE)  # 200
        yield client.post("/responses", json={**RESPONSE, "stream": True})
        yield client.get("/models")
        yield client.get("/responses/resp_never")  # 404, stored
        yield client.get("/nothing")  # 404
        yield client.get("/responses")  # 405
        yield client.post("/responses", json={})  # 400
        yield client.post("/responses", content=b"x" * 3000)  # 413
        yield client.post("/responses", content=b"x", headers={"content-type": "a/b"})  # 415
        yield client.get("/models", headers={"authorization": "Bearer x"})  # 401
        yield client.get("/models", headers={"x": "y" * 70_000})  # 431
        yield client.get("/models", headers=TWICE)  # 400
        upstream.script = partial(failing, status=500)
        yield client.post("/responses", json=RESPONSE)
        upstream.script = no_http
        yield client.post("/responses", json=RESPONSE)  # 502
    with client_of(gateway, authorization=f"Bearer {narrow}", **headers) as client:
        upstream.script = openai_like
        yield client.post("/responses", json=RESPONSE)
        yield client.post("/responses", json=RESPONSE)  # 429


async def failing(_: Received, reply: Reply, status: int) -> None:
    headers = [
        ("access-control-allow-origin", "https://elsewhere.example"),
        ("access-control-allow-credentials", "true"),
        ("access-control-expose-headers", "nothing"),
    ]
    await reply.head(status, headers, "length:0")


async def no_http(_: Received, reply: Reply) -> None:
    await reply.raw(b"not HTTP\r\n\r\n")


STATUSES = [200, 200, 200, 404, 404, 405, 400, 413, 415, 401, 431, 400, 500, 502, 200, 429]
TWICE = [("content-type", "a/b"), ("content-type", "c/d")]
SMALL = "max_body_bytes = 2048\n"


def test_a_page_can_read_every_answer(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(SMALL).start()
    statuses = []
    for answer in answers(gateway, upstream, origin=ORIGIN):
        statuses.append(answer.status_code)
        exposed = answer.headers["access-control-expose-headers"]
        assert cors_of(answer) == {
            "access-control-allow-origin": "*",
            "access-control-expose-headers": exposed,
        }, answer
        named = exposed.split(", ")
        assert {*READABLE} <= {*named}, answer
        limits = [name for name in answer.headers if name.startswith("x-ratelimit-")]
        assert {*limits} <= {*named}
        assert "Origin" in answer.headers["vary"]
    assert statuses == STATUSES


def test_without_an_origin_nothing_is_added(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """A request without an Origin gets no CORS headers."""
    gateway = make_gateway(SMALL).start()
    for answer in answers(gateway, upstream):
        assert not cors_of(answer)
        assert "vary" not in answer.headers


LISTED = 'cors_origins = ["https://app.example", "http://localhost:3000"]\n' + SMALL


def test_only_listed_origins(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(LISTED).start()
    for answer in answers(gateway, upstream, origin=ORIGIN):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "Origin" in answer.headers["vary"]
    upstream.script, key = openai_like, f"Bearer {gateway.new_key()}"
    for origin in ("https://app.example.evil", "https://APP.example", "null", "http://app.example"):
        with client_of(gateway, **{**PREFLIGHT, "origin": origin}) as client:
            refused = client.options("/responses")
            assert (refused.status_code, cors_of(refused)) == (405, {})
            served = client.post("/responses", json=RESPONSE, headers={"authorization": key})
            assert (served.status_code, cors_of(served)) == (200, {})
    with client_of(gateway, **{**PREFLIGHT, "origin": "http://localhost:3000"}) as client:
        allowed = client.options("/responses")
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"


@pytest.mark.parametrize(
    ("settings", "path", "before", "allowed"),
    [
        ("", "/v1/responses", "Host: a", b"*"),
        ("", "/dashboard/login", "Origin: https://app.example", None),
        (LISTED, "/v1/responses", "Origin: https://app.example", b"https://app.example"),
        (LISTED, "/v1/responses", "Origin: https://evil.example", None),
        (LISTED, "/v1/responses", "Host: a", None),
        ("cors_origins = []\n", "/v1/responses", "Origin: https://app.example", None),
    ],
)
def test_what_the_parser_refuses(
    make_gateway: MakeGateway, settings: str, path: str, before: str, allowed: bytes | None
) -> None:
    """If all origins are allowed, this holds even if the Origin header was not read."""
    gateway = make_gateway(settings).start()
    for header, status in (("A b: c\r\n\r\n", 400), ("A: " + "x" * 70_000, 431)):
        answer = gateway.raw(f"POST {path} HTTP/1.1\r\n{before}\r\nA: b\r\n{header}".encode())
        assert answer.startswith(b"HTTP/1.1 %d" % status)
        head = answer.partition(b"\r\n\r\n")[0]
        line = b"\r\naccess-control-allow-origin: " + (allowed or b"")
        assert (line in head) == (allowed is not None)


def test_an_origin_after_too_many_headers_counts(make_gateway: MakeGateway) -> None:
    """Browsers send it after the headers that the page sets."""
    gateway = make_gateway(LISTED).start()
    for origin, allowed in ((ORIGIN, True), ("https://evil.example", False)):
        head = "POST /v1/responses HTTP/1.1\r\nHost: a\r\n" + "A: b\r\n" * 300
        answer = gateway.raw(f"{head}Origin: {origin}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert (f"\r\naccess-control-allow-origin: {origin}\r\n".encode() in answer) == allowed


def test_it_can_be_switched_off_and_reloaded(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("cors_origins = []\n").start()
    with client_of(gateway, **PREFLIGHT) as client:
        refused = client.options("/responses")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert client.get("/responses").headers["allow"] == "POST"
        assert not cors_of(client.get("/models"))
        gateway.configure('cors_origins = ["*"]\n')
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: client.options("/responses").status_code == 204)


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "a.example", "https://A.example", "", "**"]
)
def test_a_wrong_origin_is_named(make_gateway: MakeGateway, origin: str) -> None:
    gateway = make_gateway({"server": {"cors_origins": ["*", origin]}})
    done = gateway.run("check")
    assert done.returncode == 2
    assert f"server.cors_origins: found {origin!r}" in done.stdout + done.stderr


# ── WebSocket ────────────────────────────────────────────────────────────────────────────────────

HANDSHAKE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.parametrize(
    ("settings", "origin", "status"),
    [
        ("", ORIGIN, 101),
        (LISTED, ORIGIN, 101),
        (LISTED, "https://evil.example", 403),
        (LISTED, None, 101),
        ("cors_origins = []\n", ORIGIN, 403),
        ("cors_origins = []\n", None, 101),
    ],
)
def test_the_origin_of_a_websocket(
    make_gateway: MakeGateway, upstream: Upstream, settings: str, origin: str | None, status: int
) -> None:
    """Browsers send no preflight for a handshake, so one from another origin is refused."""
    upstream.talk = ws_like_openai
    gateway = make_gateway(settings).start()
    lines = {**HANDSHAKE, "host": "g", "authorization": f"Bearer {gateway.new_key()}"}
    lines |= {"origin": origin} if origin else {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as sock:
        sock.sendall(f"GET /v1/responses HTTP/1.1\r\n{head}\r\n".encode())
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 %d" % status), answer
    assert (b"origin_not_allowed" in answer) == (status == 403)


# ── In a browser ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


def launch(playwright: Playwright, *arguments: str) -> Browser:
    path = needs("chromium")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *arguments])


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    with launch(playwright) as running:
        yield running


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Serve the npm packages from another origin; yield its URL."""
    assert (NODE_MODULES / "openai" / "index.mjs").exists()
    handler = partial(Quiet, directory=NODE_MODULES)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join(10)


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    with browser.new_page() as page:
        page.goto(f"{site}/openai/package.json")
        yield page


SCRIPT = """async ([baseURL, apiKey, work]) => {
    const { default: OpenAI } = await import('/openai/index.mjs');
    const options = { baseURL, apiKey, dangerouslyAllowBrowser: true, maxRetries: 0 };
    const client = new OpenAI(options);
    return await eval(work)(client, OpenAI);
}"""


def in_page(page: Page, gateway: Gateway, key: str, work: str) -> Any:
    """Run an async function of the client (and the package) in the page; return its result."""
    return page.evaluate(SCRIPT, [gateway.base_url, key, work])


def test_the_openai_package_in_a_page(gateway: Gateway, page: Page, key: str) -> None:
    said = in_page(
        page,
        gateway,
        key,
        """async client => {
            const said = [];
            const chat = { model: 'gpt-up', messages: [{ role: 'user', content: 'Hi' }] };
            const asked = client.chat.completions.create(chat);
            const { data, response, request_id } = await asked.withResponse();
            said.push(data.choices[0].message.content, request_id);
            said.push(response.headers.get('x-redbtc-request-id'));
            let text = '';
            const streamed = { ...chat, stream: true };
            for await (const chunk of await client.chat.completions.create(streamed))
                text += chunk.choices[0]?.delta?.content ?? '';
            const stream = await client.responses.create(
                { model: 'gpt-up', input: 'Hi', stream: true },
                { idempotencyKey: 'order-17' },
            );
            const kinds = [];
            for await (const event of stream) kinds.push(event.type);
            const models = [];
            for await (const model of client.models.list()) models.push(model.id);
            return [...said, text, kinds.at(-1), models];
        }""",
    )
    content, request_id, own_id, text, last, models = said
    assert content == text == "Hello there!"
    assert request_id == own_id
    assert last == "response.completed"
    assert models == ["gpt-up", "gpt-other"]
    assert {row["outcome"] for row in gateway.rows()} == {"completed"}


def test_events_reach_a_page_as_they_come(
    gateway: Gateway, upstream: Upstream, page: Page, key: str
) -> None:
    """The upstream sends the second event only after the page has received the first."""
    seen = threading.Event()
    pieces = response_pieces(["Hel", "lo"])

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(pieces[0])
        assert await reply.wait(seen, 60)
        for piece in pieces[1:]:
            await reply.send(piece)
        await reply.end()

    upstream.script = script
    page.expose_function("seen", seen.set)
    kinds = in_page(
        page,
        gateway,
        key,
        """async client => {
            const input = { model: 'gpt-up', input: 'Hi', stream: true };
            const kinds = [];
            for await (const event of await client.responses.create(input)) {
                if (!kinds.length) await window.seen();
                kinds.push(event.type);
            }
            return kinds;
        }""",
    )
    assert (kinds[0], kinds[-1], len(kinds)) == ("response.created", "response.completed", 5)


def test_a_page_reads_refusals(gateway: Gateway, page: Page) -> None:
    narrow = gateway.new_key("narrow", requests_per_minute=1)
    work = """async (client, OpenAI) => {
        const caught = [];
        for (const apiKey of [client.apiKey, client.apiKey, 'sk-redbtc-wrong'])
            try {
                await client.withOptions({ apiKey }).responses.create(
                    { model: 'gpt-up', input: 'Hi' });
            } catch (error) {
                const { status, message, code, headers } = error;
                const names = ['retry-after', 'retry-after-ms', 'x-ratelimit-limit-requests'];
                caught.push([error.constructor.name, status, message, code, error.requestID,
                    ...names.map(name => headers.get(name))]);
            }
        return caught;
    }"""
    limited, wrong = in_page(page, gateway, narrow, work)
    assert limited[:2] == ["RateLimitError", 429]
    assert limited[3] == "rate_limit_exceeded"
    assert 1 <= int(limited[5]) <= 60
    assert int(limited[6]) > 0
    assert limited[7] == "1"
    assert wrong[:2] == ["AuthenticationError", 401]
    assert "Incorrect API key provided" in wrong[2]
    assert wrong[4].startswith("req_")


def test_a_page_reads_every_header_of_an_upstream(
    gateway: Gateway, upstream: Upstream, page: Page, key: str
) -> None:
    """An unknown header is readable as well, since "*" is among the exposed names."""

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(
            200, [("x-new-thing", "7"), ("content-type", "application/json")], "length:2"
        )
        await reply.send(b"{}")

    upstream.script = script
    work = """async client => {
        const asked = client.responses.create({ model: 'gpt-up', input: 'Hi' });
        return (await asked.asResponse()).headers.get('x-new-thing');
    }"""
    assert in_page(page, gateway, key, work) == "7"


def test_a_page_of_another_origin_reads_nothing_else(make_gateway: MakeGateway, page: Page) -> None:
    gateway = make_gateway('cors_origins = ["https://app.example"]').start()
    key = gateway.new_key()
    work = """async (client, OpenAI) => {
        try { await client.models.list(); } catch (error) { return error.constructor.name; }
    }"""
    assert in_page(page, gateway, key, work) == "APIConnectionError"
    fetched = page.evaluate(
        """async url => {
            const paths = ['/healthz', '/status', '/dashboard/login', '/admin/v1/me', '/metrics'];
            const read = path => fetch(url + path).then(() => path, () => null);
            return (await Promise.all(paths.map(read))).filter(path => path);
        }""",
        gateway.url,
    )
    assert fetched == []


def test_a_page_of_the_internet_needs_the_users_leave_and_no_other_header(
    gateway: Gateway, playwright: Playwright, site: str, key: str
) -> None:
    """Local Network Access: Chromium asks its user, not the server, whether a page from the
    internet may call this machine. Then the ordinary preflight is enough."""
    public = f"--ip-address-space-overrides={site.removeprefix('http://')}=public"
    secure = f"--unsafely-treat-insecure-origin-as-secure={site}"
    with launch(playwright, public, secure) as running:
        context = running.new_context()
        page = context.new_page()
        page.goto(f"{site}/openai/package.json")
        work = """async client => {
            try { return (await client.models.list()).data.length; }
            catch (error) { return error.constructor.name; }
        }"""
        assert in_page(page, gateway, key, work) == "APIConnectionError"
        context.grant_permissions(["local-network-access"])
        assert in_page(page, gateway, key, work) == 2
