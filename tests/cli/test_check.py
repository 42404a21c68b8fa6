"""`check --upstreams`: what it says of each member, and its exit status."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from typing import Any

import pytest

from redbtc.store.schema import newest_version
from tests.helpers.gateway import Gateway, MakeGateway, free_port
from tests.helpers.ledgers import make_ledger
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    Upstream,
    json_answer,
    openai_like,
    silent,
)

CANARY = "sk-canary-0123456789"


def check(gateway: Gateway, status: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what the command prints of the upstreams, as JSON and as text."""
    done = gateway.run("check", "--upstreams", "--json")
    text = gateway.run("check", "--upstreams")
    assert (done.returncode, text.returncode) == (status, status), done.stderr + text.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is (status == 0)
    assert text.stdout.splitlines()[-1] == ("not ok" if status else "ok")
    assert CANARY not in done.stdout + text.stdout + done.stderr + text.stderr
    lines = [line for line in text.stdout.splitlines() if line.startswith("upstream ")]
    return found["upstreams"], lines


@pytest.mark.parametrize("running", [True, False])
def test_all_members_answer(make_gateway: MakeGateway, upstream: Upstream, running: bool) -> None:
    tables = [
        {"name": "two", "base_url": upstream.url, "api_key_envs": ["A", "B"]},
        {"name": "one", "base_url": upstream.url, "api_key_env": "", "models": ["gpt-o*"]},
        {"name": "other", "base_url": upstream.url, "api_key_env": "A", "transport": "httpx"},
    ]
    gateway = make_gateway({"upstreams": tables}, A=CANARY, B=CANARY)
    if running:
        gateway.start()
    found, lines = check(gateway, 0)
    counts = {"two/A": 2, "two/B": 2, "one": 1, "other": 2}
    assert found == [
        {"name": name, "ok": True, "models": count, "status": 200, "code": None}
        for name, count in counts.items()
    ]
    assert lines[1:3] == ["upstream two/B: 2 models", "upstream one: 1 model"]
    assert "upstreams" not in gateway.cli("check"), "they were not asked"


@pytest.mark.skipif(find_spec("socksio") is not None, reason="socksio is installed")
def test_a_proxy_that_needs_a_missing_package_is_a_problem(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    table = {"name": "one", "base_url": upstream.url, "transport": "httpx"}
    gateway = make_gateway({"upstreams": [{**table, "proxy": "socks5://127.0.0.1:1"}]})
    done = gateway.run("check")
    assert done.returncode == 2
    assert "upstreams[0].proxy: a SOCKS proxy needs the Python package socksio" in done.stdout
    done = gateway.run("serve")
    assert "Traceback" not in done.stderr
    assert "socksio" in done.stderr


ERROR = {"message": f"Incorrect API key: {CANARY}", "type": "invalid_request_error", "param": None}


@pytest.mark.parametrize(
    ("script", "status", "code", "text"),
    [
        (
            json_answer({"error": {**ERROR, "code": "invalid_api_key"}}, 401),
            *(401, "invalid_api_key", "status 401 (invalid_api_key)"),
        ),
        (
            json_answer({"error": {**ERROR, "code": None}}, 429),
            *(429, "invalid_request_error", "status 429 (invalid_request_error)"),
        ),
        (
            json_answer({"error": {**ERROR, "code": f"no {CANARY}"}}, 403),
            403,
            "invalid_request_error",
            "status 403 (invalid_request_error)",
        ),
        (json_answer({"error": CANARY}, 500), 500, None, "status 500"),
        (json_answer([CANARY], 404), 404, None, "status 404"),
        (json_answer(CANARY.encode(), 302), 302, None, "status 302"),
        (json_answer({"data": CANARY}), 200, "not_a_list", "the answer is not a list of models"),
        (json_answer(b"<html>"), 200, "not_a_list", "the answer is not a list of models"),
        (None, None, "reset", "no answer (reset)"),
    ],
)
def test_one_fails(
    make_gateway: MakeGateway,
    upstream: Upstream,
    script: Script | None,
    status: int | None,
    code: str | None,
    text: str,
) -> None:
    async def answer(request: Received, reply: Reply) -> None:
        if request.header("authorization") == f"Bearer {CANARY}":
            await openai_like(request, reply)
        elif script:
            await script(request, reply)
        else:
            reply.close()

    upstream.script = answer
    table = {"name": "up", "base_url": upstream.url, "api_key_envs": ["GOOD", "BAD"]}
    gateway = make_gateway({"upstreams": [table]}, GOOD=CANARY, BAD=f"{CANARY}-bad")
    found, lines = check(gateway, 1)
    assert [each["ok"] for each in found] == [True, False]
    assert found[1] == {
        "name": "up/BAD",
        "ok": False,
        "models": None,
        "status": status,
        "code": code,
    }
    assert lines == ["upstream up/GOOD: 2 models", f"upstream up/BAD: {text}"]


def test_without_an_answer(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """A refused port, an upstream that says nothing, and one whose key is missing, which is a
    problem of the settings."""

    upstream.script = silent
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    gone = {"name": "gone", "base_url": nowhere, "api_key_env": ""}
    slow = {"name": "slow", "base_url": upstream.url, "api_key_env": ""}
    gateway = make_gateway({"upstreams": [gone, {**slow, "first_byte_timeout_seconds": 0.5}]})
    found, lines = check(gateway, 1)
    assert [(each["ok"], each["status"]) for each in found] == [(False, None)] * 2
    assert all(line.split(": ")[1].startswith("no answer (") for line in lines)
    assert found[1]["code"] == "first_byte_timeout"
    gateway.configure({"upstreams": [{**gone, "api_key_env": "NOT_THERE"}]})
    found, lines = check(gateway, 2)
    assert found[0]["code"] == "unusable"
    assert "upstream gone: not asked, since an environment variable is not set" in lines
    assert 'upstream "gone": environment variable NOT_THERE is not set' in lines


def test_wrong_settings_ask_nobody(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("[server]\nprot = 1")
    done: subprocess.CompletedProcess[str] = gateway.run("check", "--upstreams", "--json")
    assert done.returncode == 2
    assert "server.prot" in json.loads(done.stdout)["problems"][0]
    assert not upstream.requests


def test_a_migration_is_announced(make_gateway: MakeGateway) -> None:
    gateway, newest = make_gateway(), newest_version()
    assert gateway.cli("check")["notes"] == [], "there is no database yet"
    make_ledger(gateway.database, newest - 1)
    before = gateway.database.read_bytes()
    said = f"the database has schema {newest - 1}; this version migrates it to {newest}"
    assert [each for each in gateway.cli("check")["notes"] if each.startswith(said)]
    assert gateway.database.read_bytes() == before
    for file in gateway.folder.glob(f"{gateway.database.name}*"):
        file.unlink()
    make_ledger(gateway.database, newest)
    assert not [each for each in gateway.cli("check")["notes"] if "schema" in each]
