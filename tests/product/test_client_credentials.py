"""A developer's own credential, from end to end: where it goes, where it must never be, and Codex
CLI with a ChatGPT login."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backports.zstd
import httpx2
import pytest
from websockets.exceptions import InvalidStatus

from tests.helpers.credentials import jwt, login, settings_of, table, with_key
from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    ROOT,
    UPSTREAM_KEY,
    USUAL,
    Gateway,
    MakeGateway,
)
from tests.helpers.response_store import BODY, ResponseStore
from tests.helpers.tools import needs
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    event,
    json_answer,
    response_object,
    response_pieces,
    responses_stream,
    silent,
    stream,
    ws_events,
)
from tests.helpers.websocket_client import client as session

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7]

WORKSPACE = "workspace-canary-5501"
LOGIN = login("user-canary-9417", WORKSPACE)
OWN_KEY = "sk-own-canary-61aa"
HEADER, PAYLOAD, SIGNATURE = LOGIN["authorization"].removeprefix("Bearer ").split(".")
CANARIES = [each.encode() for each in (PAYLOAD, SIGNATURE, WORKSPACE, OWN_KEY, "user-canary-9417")]


def canaries_in(data: bytes) -> list[bytes]:
    return [each for each in CANARIES if each.lower() in data.lower()]


def all_sent(upstream: Upstream) -> bytes:
    """Return all bytes that an upstream has received."""
    parts = [b" ".join(line) for request in upstream.requests for line in request.headers]
    parts += [request.path.encode() + request.body for request in upstream.requests]
    return b"\n".join([*parts, *(text for sock in upstream.sockets for text in sock.texts)])


def written(gateway: Gateway) -> dict[str, list[bytes]]:
    """Return the canaries in each file of a gateway's folder, its log and output included."""
    files = [path for path in gateway.folder.rglob("*") if path.is_file()]
    assert gateway.database in files
    found = {path.name: canaries_in(path.read_bytes()) for path in files}
    return {name: canaries for name, canaries in found.items() if canaries}


@pytest.fixture
def own() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture
def nobody() -> Iterator[Upstream]:
    """A listener that must get nothing."""
    with Upstream() as running:
        yield running


def quotes(request: Received, status: int) -> tuple[Any, int, dict[str, str]]:
    """Return an error that quotes all that it was sent, in all places that an error has."""
    said = " ".join(value.decode() for _, value in request.headers)
    token = (request.header("authorization") or "").removeprefix("Bearer ")
    error = {"message": said, "type": token, "code": token, "param": said}
    return {"error": error}, status, {"x-echo": said}


class Misbehaving:
    """The script of the clients' upstream. The input of a request says how it is answered."""

    def __init__(self, elsewhere: str) -> None:
        self.stored = ResponseStore()
        self.began = threading.Event()
        self._elsewhere = elsewhere

    async def __call__(self, request: Received, reply: Reply) -> None:
        said = request.json()["input"] if request.body else ""
        if said in ("400", "401", "403", "404", "429", "500", "503"):
            await json_answer(*quotes(request, int(said)))(request, reply)
        elif said == "redirect":
            headers = {"location": f"{self._elsewhere}/responses"}
            await json_answer({}, 307, headers)(request, reply)
        elif said == "stream":
            await responses_stream()(request, reply)
        elif said == "torn":
            await stream(response_pieces(["Hello"])[:3], end="tear")(request, reply)
        elif said == "silent":
            self.began.set()
            await silent(request, reply)
        elif said == "endless":
            await stream([*response_pieces(["Hello"])[:3], *[b": x\n\n"] * 300], 0.1)(
                request, reply
            )
        elif said == "failed":
            error = quotes(request, 200)[0]["error"]
            last = response_object(status="failed", error=error, usage=None)
            await stream([event({"type": "response.failed", "response": last})])(request, reply)
        else:
            await self.stored(request, reply)


async def talk(sock: Socket) -> None:
    while True:
        frame = await sock.recv()
        error = quotes(sock.received, 200)[0]["error"]
        if frame["input"] in ("401", "429", "500"):
            await sock.send({"type": "error", "status": int(frame["input"]), "error": error})
        elif frame["input"] == "torn":
            await sock.send(*ws_events(len(sock.frames), frame)[:2])
            sock.tear()
        else:
            await sock.send(*ws_events(len(sock.frames) + 100 * len(sock.received.path), frame))


@pytest.mark.front_door
def test_the_credential_is_nowhere_else(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream, nobody: Upstream
) -> None:
    """Through everything that a request can meet: not in what another upstream receives, and not in
    a file, also after `kill -9`."""
    own.script, own.talk = Misbehaving(nobody.url), talk
    with Upstream() as broken:
        broken.script = json_answer({"error": {"message": "", "code": "server_error"}}, 503)
        gateway = make_gateway(
            settings_of(
                table(broken, "clients-broken", models=["gpt-up"], credentials="client"),
                table(own, "clients", models=["gpt-up"], credentials="client", priority=2),
                table(upstream, "operators", priority=3),
                table(nobody, "nobody", models=["nothing"]),
                server={"log_level": "debug"},
            )
        ).start()
        key = gateway.new_key()
        statuses = ["400", "401", "403", "404", "429", "500", "503"]
        ways = ["redirect", "stream", "torn", "failed", "store", "background", "json"]
        for headers in (with_key(key, **LOGIN), with_key(key, f"Bearer {OWN_KEY}")):
            with httpx2.Client(base_url=gateway.base_url, headers=headers, **USUAL) as http:
                for way in (*statuses, *ways, "other-model"):
                    send(http, way)
                http.get("/models")
                http.get("/models/gpt-up")
            for way in ("401", "429", "500", "torn", "fine", "unknown"):
                with contextlib.suppress(InvalidStatus), session(gateway, "", **headers) as ws:
                    ws.send(input=way, model="gpt-other" if way == "unknown" else "gpt-up")
                    with contextlib.suppress(Exception):
                        ws.until("response.completed", "error")
            bad = {**headers, "x-gateway-key": "sk-redbtc-wrong"}
            assert httpx2.get(f"{gateway.base_url}/models", headers=bad, **USUAL).is_error
        assert canaries_in(all_sent(own)) == CANARIES[:-1], "it passes where it should"
        assert canaries_in(all_sent(broken))
    rows = gateway.rows()
    assert {row["credentials"] for row in rows} == {"client", "operator"}
    shown = json.dumps([rows, gateway.cli("upstream", "list"), gateway.cli("usage")])
    shown += gateway.get("/metrics").text + gateway.get("/status").text + gateway.log()
    assert not canaries_in(shown.encode())
    kill_in_flight(gateway, own.script, key)
    gateway.start()
    gateway.cli("db", "backup", str(gateway.folder / "backup.db"))
    gateway.flushed_log()
    gateway.terminate()
    assert {row["outcome"] for row in gateway.rows()} >= {"interrupted", "completed"}
    assert written(gateway) == {}
    for other in (upstream, nobody):
        assert not canaries_in(all_sent(other))
    assert f"Bearer {UPSTREAM_KEY}".encode() in all_sent(upstream)
    # Only the gateway's own request for the list of models.
    assert {request.path for request in nobody.requests} <= {"/v1/models", "/v1/models/gpt-up"}


def send(http: httpx2.Client, way: str) -> None:
    """Send a request that is answered in this way; see Misbehaving."""
    body: dict[str, Any] = {**BODY, "input": way, "stream": way in ("stream", "torn", "failed")}
    if way == "json":
        http.post("/responses", content=b'{"model": "gpt-up", "input": ')
    elif way == "other-model":
        assert http.post("/responses", json={**BODY, "model": "gpt-x"}).status_code == 200
    elif way == "background":
        assert http.post("/responses", json={**BODY, "background": True}).status_code == 400
    elif way == "store":
        name = http.post("/responses", json=BODY).json()["id"]
        assert http.get(f"/responses/{name}").status_code == 200
        assert http.delete(f"/responses/{name}").status_code == 200
    else:
        with contextlib.suppress(httpx2.HTTPError):
            http.post("/responses", json=body)


def kill_in_flight(gateway: Gateway, script: Misbehaving, key: str) -> None:
    """Kill the gateway while requests wait for an upstream, and are answered."""
    script.began.clear()

    def ask(headers: dict[str, str], way: str) -> None:
        with contextlib.suppress(httpx2.HTTPError):
            body = {**BODY, "input": way, "stream": True}
            httpx2.post(f"{gateway.base_url}/responses", headers=headers, json=body, **USUAL)

    threads = [
        threading.Thread(target=ask, args=(with_key(key, **LOGIN), way))
        for way in ("silent", "endless")
    ]
    for thread in threads:
        thread.start()
    assert script.began.wait(PATIENCE_SECONDS)
    time.sleep(1.5)  # progress is saved after a second
    gateway.kill()
    for thread in threads:
        thread.join()


# ── Codex CLI ────────────────────────────────────────────────────────────────────────────────────

DOCUMENTED = re.search(
    r"```toml\n(model_provider.*?)```", (ROOT / "docs" / "clients.md").read_text(), re.DOTALL
)
AUTH = "https://api.openai.com/auth"


def documented(gateway: Gateway, backend: Upstream) -> str:
    """Return the settings of docs/clients.md. Codex CLI asks `backend` what it asks chatgpt.com."""
    assert DOCUMENTED
    settings = DOCUMENTED[1].replace("http://127.0.0.1:8080/v1", gateway.base_url)
    return f'model = "gpt-5.5"\nchatgpt_base_url = "{backend.url}"\n{settings}'


def chatgpt_token() -> str:
    """Return a token of a ChatGPT login that Codex CLI need not refresh."""
    now = int(time.time())
    user = {"chatgpt_account_id": WORKSPACE, "chatgpt_user_id": "user-1"}
    claims = {AUTH: {**user, "chatgpt_plan_type": "pro"}, "exp": now + 30 * 86_400, "iat": now}
    return jwt("auth0|user-canary-9417", email="ada@example.com", **claims)


def tokens(token: str) -> dict[str, Any]:
    """Return what Codex CLI keeps of a ChatGPT login."""
    kept = {"id_token": token, "access_token": token, "refresh_token": OWN_KEY}
    today = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"tokens": {**kept, "account_id": WORKSPACE}, "last_refresh": today}


def codex(key: str, home: Path, settings: str, login: dict[str, Any]) -> str:
    """Run one turn of Codex CLI with a login. Return what it said."""
    home.mkdir()
    (home / "config.toml").write_text(settings)
    (home / "auth.json").write_text(json.dumps({"OPENAI_API_KEY": None, **login}))
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "CODEX_HOME": str(home)}
    done = subprocess.run(
        [needs("codex"), "exec", "--skip-git-repo-check", "--json", "hello"],
        env={**env, "REDBTC_API_KEY": key},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def answer(request: Received, reply: Reply) -> None:
    """Answer a request that may be compressed."""
    if request.header("content-encoding") == "zstd":
        request.body = backports.zstd.decompress(request.body)
    await responses_stream()(request, reply)


async def answer_frames(sock: Socket) -> None:
    while True:
        await sock.send(*ws_events(len(sock.frames), await sock.recv()))


def test_codex_cli_with_an_api_key_of_its_own(
    make_gateway: MakeGateway, own: Upstream, nobody: Upstream, tmp_path: Path
) -> None:
    own.script, own.talk = answer, answer_frames
    nobody.script = json_answer({}, 404)
    gateway = make_gateway(settings_of(table(own, "keys", credentials="client"))).start()
    login = {"auth_mode": "apikey", "OPENAI_API_KEY": OWN_KEY}
    codex(gateway.new_key(), tmp_path / "codex", documented(gateway, nobody), login)
    assert {request.header("authorization") for request in own.requests} == {f"Bearer {OWN_KEY}"}
    assert {row["credentials"] for row in gateway.rows()} == {"client"}


@pytest.mark.parametrize("websocket", [False, True])
@pytest.mark.parametrize("name", ["Gateway", "OpenAI"])
def test_codex_cli_with_a_chatgpt_login(
    make_gateway: MakeGateway,
    upstream: Upstream,
    own: Upstream,
    nobody: Upstream,
    tmp_path: Path,
    name: str,
    websocket: bool,
) -> None:
    """Its provider is named as docs/clients.md says, or "OpenAI": then it compresses bodies."""

    own.script, own.talk = answer, answer_frames
    nobody.script = json_answer({}, 404)  # what Codex CLI asks of chatgpt.com by itself
    gateway = make_gateway(
        settings_of(
            table(own, "chatgpt", models=["gpt-5*"], credentials="client", billing="free"),
            table(upstream, "operators"),
            billing={"unpriced_models": "refuse"},
        )
    ).start()
    key = gateway.new_key()
    settings = documented(gateway, nobody)
    settings = settings.replace('"OpenAI"', f'"{name}"').replace(
        "supports_websockets = true", f"supports_websockets = {str(websocket).lower()}"
    )
    token = chatgpt_token()
    said = codex(key, tmp_path / "codex", settings, {"auth_mode": "chatgpt", **tokens(token)})
    (used,) = [
        line["usage"]
        for line in map(json.loads, said.splitlines())
        if line["type"] == "turn.completed"
    ]
    assert own.requests
    for request in own.requests:
        assert request.path == "/v1/responses"
        assert request.header("authorization") == f"Bearer {token}"
        assert request.header("chatgpt-account-id") == WORKSPACE
        assert request.header("x-gateway-key") is None
        assert bool(request.header("upgrade")) == websocket
        if not websocket:
            coding = request.header("content-encoding")
            assert coding == ("zstd" if name == "OpenAI" else None)
    rows = gateway.rows()
    assert {(row["upstream"], row["credentials"], row["outcome"]) for row in rows} == {
        ("chatgpt", "client", "completed")
    }
    assert {float(row["cost"]) for row in rows} == {0}
    assert used["input_tokens"] in {row["input_tokens"] for row in rows}
    assert key.encode() not in all_sent(own)
    gateway.terminate()
    payload, signature = (each.encode() for each in token.split(".")[1:])
    for path in gateway.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert payload not in data, path
            assert signature not in data, path
            assert not canaries_in(data), path
    assert not [request for request in upstream.requests if request.path != "/v1/models"]
    assert not canaries_in(all_sent(upstream))
    assert payload not in all_sent(upstream)
