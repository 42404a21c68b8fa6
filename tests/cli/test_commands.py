"""The command line: on a running gateway and on a stopped one, in text and in JSON."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3

import click
import pytest
from click.testing import CliRunner

from redbtc.cli import (
    main,
    serve,  # noqa: F401
)
from redbtc.config import Settings, load_settings
from redbtc.store import keys
from redbtc.store.schema import migrations
from tests.helpers.gateway import ROOT, Gateway, MakeGateway
from tests.helpers.upstream import Upstream

pytestmark = pytest.mark.promise_5


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.front_door
def test_accounts_and_keys(make_gateway: MakeGateway, running: bool) -> None:
    gateway = make_gateway()
    if running:
        gateway.start()
    added = gateway.cli("account", "add", "Ada Lovelace", "--email", "a@b.c", "--concurrency", "4")
    assert (added["name"], added["status"], added["concurrency"]) == ("Ada Lovelace", "active", 4)
    assert gateway.cli("account", "show", added["id"])["email"] == "a@b.c"
    again = gateway.run("account", "add", "Ada Lovelace")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "Error: account 'Ada Lovelace' already exists\n"
    changed = gateway.cli("account", "set", "Ada Lovelace", "--concurrency", "default")
    assert changed["concurrency"] is None
    suspended = gateway.cli("account", "suspend", "Ada Lovelace", "--reason", "late")
    assert (suspended["status"], suspended["status_reason"]) == ("suspended", "late")
    assert gateway.cli("account", "resume", "Ada Lovelace")["status"] == "active"
    key = gateway.cli("key", "add", "Ada Lovelace", "--label", "ci", "--expires", "30d")
    assert re.fullmatch(r"sk-redbtc-[0-9A-Za-z]{49}", key["key"])
    assert (key["account"], key["label"]) == ("Ada Lovelace", "ci")
    assert key["expires_at"] > key["created_at"]
    (listed,) = gateway.cli("key", "list", "Ada Lovelace")["keys"]
    assert "key" not in listed
    assert listed["id"] == key["id"]
    assert gateway.cli("key", "revoke", key["id"])["revoked_at"]
    (account,) = gateway.cli("account", "list")["accounts"]
    assert account["keys_in_force"] == 0
    assert gateway.cli("db", "check") == {"ok": True, "problems": []}
    for command in (["account", "list"], ["key", "list", "Ada Lovelace"], ["db", "check"]):
        assert gateway.run(*command).returncode == 0


def test_only_the_hash_is_stored(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.cli("account", "add", "x")
    key = gateway.cli("key", "add", "x")["key"]
    with sqlite3.connect(gateway.database) as database:
        dump = "\n".join(database.iterdump())
    database.close()
    assert key[10:40] not in dump
    hashed = keys.hash_of_key(key)
    assert hashed is not None
    assert hashed.hex().upper() in dump.upper()


def test_a_keys_form() -> None:
    for _ in range(200):
        key = keys.new_key()
        assert keys.hash_of_key(key)
        assert keys.hash_of_key(key[:-7] + ("A" if key[-7] != "A" else "B") + key[-6:]) is None
    for wrong in ("", "sk-redbtc-", "sk-" + "0" * 56, keys.new_key() + "\n", "\u00e9"):
        assert keys.hash_of_key(wrong) is None
    assert keys.base62(0, 3) == "000"
    assert keys.base62(62**2, 3) == "100"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["account", "show", "nobody"], 1),
        (["key", "add", "nobody"], 1),
        (["key", "revoke", "key_0"], 1),
        (["account", "add", "a/b"], 1),
        (["account", "add", " "], 1),
        (["usage", "--since", "yesterday-ish"], 1),
        (["usage", "--account", "nobody"], 1),
        (["account", "add"], 2),
        (["account", "add", "x", "--concurrency", "-1"], 2),
        (["account", "add", "x", "--concurrency", "many"], 2),
        (["account", "set", "x"], 2),
        (["nonsense"], 2),
        (["usage", "--limit", "0"], 2),
        (["serve", "--port", "99999"], 2),
        (["usage", "--since", "0001-01-01T00:00:00+14:00"], 1),
        (["usage", "--group-by", "colour"], 1),
        (["usage", "--group-by", "day", "--limit", "3"], 2),
        (["usage", "--csv", "--json"], 2),
        (["usage", "--account", "\udcff"], 2),
        (["account", "add", "x", "--credit-limit", "1e3"], 2),
        (["account", "add", "x", "--credit-limit=-1"], 2),
        (["account", "add", "x", "--monthly-budget", "9000000001"], 2),
        (["price", "add", "m"], 1),
        (["price", "add", "m", "--input=-1"], 1),
        (["price", "add", "m", "--input", "0.0000000001"], 1),
        (["price", "add", "m", "--input", "1", "--effective", "999999999w"], 1),
        (["price", "add", "m", "--input", "1", "--effective", "9999-12-31"], 1),
        (["price", "add", "m", "--input", "1", "--tier", "FLEX"], 1),
        (["price", "add", "m", "--input", "1", "--above-input-tokens", "-1"], 1),
        (["price", "add", "m", "--input", "1", "--without-notice"], 2),
        (["price", "add", "m", "--input", "1", "--reason", "none"], 2),
        (["price", "add", "a\nb", "--input", "1"], 1),
        (["price", "import", "nowhere.toml"], 2),
        (["payment", "add", "nobody", "1"], 1),
        (["payment", "add", "nobody"], 2),
        (["payment", "add", "nobody", "1", "--sense", "none"], 2),
        (["payment", "list", "nobody"], 1),
        (["statement", "nobody", "2026-11"], 1),
        (["statement", "nobody", "2026-13"], 1),
        (["statement", "nobody"], 2),
        (["notice", "add", "--kind", "budget", "Text."], 2),
        (["notice", "add", "--kind", "incident", ""], 1),
        (["notice", "add", "--kind", "incident", "Text.", "--effective", "999999999w"], 1),
        (["notice", "withdraw", "ntc_0"], 1),
    ],
)
def test_exit_status_and_one_clear_line(
    make_gateway: MakeGateway, arguments: list[str], status: int
) -> None:
    done = make_gateway().run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")


@pytest.mark.front_door
def test_usage(gateway: Gateway, upstream: Upstream) -> None:
    for account, path, count in (("a", "/responses", 3), ("b", "/chat/completions", 2)):
        with gateway.client(gateway.new_key(account)) as client:
            for number in range(count):
                body = {"model": f"gpt-{number}", "input": "x", "messages": []}
                assert client.post(path, json=body).status_code == 200
    found = gateway.cli("usage")
    assert [row["account"] for row in found["requests"]] == ["a", "a", "a", "b", "b"]
    assert found["totals"]["requests"] == 5
    assert found["totals"]["input_tokens"] == 3 * 30 + 2 * 20
    assert list(found["requests"][0]) == [
        "request_id",
        "account",
        "key_id",
        "endpoint",
        "model",
        "requested_model",
        "upstream",
        "started_at",
        "first_byte_ms",
        "duration_ms",
        "status",
        "outcome",
        "usage_source",
        "input_tokens",
        "cached_input_tokens",
        "cache_write_tokens",
        "output_tokens",
        "reasoning_tokens",
        "image_input_tokens",
        "image_output_tokens",
        "web_searches",
        "service_tier",
        "response_id",
        "cost",
        "currency",
        "price_id",
        "month",
        "tool_input_tokens",
        "cache_write_12h_tokens",
        "file_searches",
        "containers",
        "audio_input_tokens",
        "audio_output_tokens",
        "audio_ms",
        "characters",
        "estimated_cost",
        "corrected_at",
        "attempts",
        "upstream_status",
        "upstream_error_code",
        "upstream_request_id",
        "credentials",
    ]
    assert len(gateway.cli("usage", "--account", "a")["requests"]) == 3
    key_id = found["requests"][-1]["key_id"]
    assert len(gateway.cli("usage", "--key", key_id)["requests"]) == 2
    assert len(gateway.cli("usage", "--model", "gpt-[01]")["requests"]) == 4
    newest = gateway.cli("usage", "--limit", "2")
    assert newest["requests"] == found["requests"][-2:]
    assert newest["totals"]["requests"] == 5
    assert gateway.cli("usage", "--until", "1h")["requests"] == []
    assert len(gateway.cli("usage", "--since", "1h")["requests"]) == 5
    assert gateway.cli("usage", "--since", found["requests"][2]["started_at"])["totals"][
        "requests"
    ] in (3, 4, 5)
    rows = list(csv.DictReader(io.StringIO(gateway.run("usage", "--csv").stdout)))
    assert [row["input_tokens"] for row in rows] == ["30", "30", "30", "20", "20"]
    text = gateway.run("usage").stdout
    assert "Totals" in text
    assert text.count("completed") == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("[server]\nprot = 1", ["server.prot: unknown key", "port"]),
        ('[limits]\nconcurrency = "x"', ["limits.concurrency: found 'x'; expected a whole number"]),
        ("[limits]\nconcurrency = -1", ["limits.concurrency: found -1", ">= 0"]),
        ("[limits.account]\nburst = 1", ["limits.account.burst: unknown key"]),
        (
            '[metering]\non_disconnect = "stop"',
            ["metering.on_disconnect: found 'stop'; allowed are 'drain', 'cancel'"],
        ),
        ("[metering]\nunmetered = 1", ["metering.unmetered: found 1; expected a string"]),
        (
            '[[upstreams]]\ntransport = "tcp"',
            ["transport: found 'tcp'; allowed are 'asyncio', 'httpx'"],
        ),
        ('[server]\ntrusted_proxies = ["x"]', ["server.trusted_proxies: found 'x'"]),
        ('[[upstreams]]\nname = "a"\nbase_url = "ftp://x"', ["base_url: found 'ftp://x'"]),
        ("[server]\nport =", ["not valid TOML"]),
        ("[nonsense]\na = 1", ["nonsense: unknown key"]),
    ],
)
def test_wrong_settings_stop_the_start(
    make_gateway: MakeGateway, settings: str, said: list[str]
) -> None:
    gateway = make_gateway()
    gateway.configure(settings)
    if "prot" in settings or "trusted" in settings or "port =" in settings:
        gateway.config.write_text(settings)
    for command, status in ((["check"], 2), (["serve"], 1)):
        done = gateway.run(*command)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        for part in said:
            assert part in done.stdout + done.stderr


def test_check_names_variables_that_are_not_set(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    assert gateway.cli("check")["ok"]
    gateway.start()
    assert gateway.cli("check")["ok"]
    gateway._env.pop("TEST_UPSTREAM_KEY")
    done = gateway.run("check", "--json")
    assert done.returncode == 2
    assert "TEST_UPSTREAM_KEY" in json.loads(done.stdout)["problems"][0]


def test_the_settings_file_shows_every_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDBTC_CONFIG", raising=False)
    assert load_settings(str(ROOT / "config.toml")).settings == Settings()
    text = (ROOT / "config.toml").read_text()
    names = re.findall(r"^(\w+) =", text, re.MULTILINE)
    settings = Settings()
    tables = [getattr(settings, name) for name in settings.__struct_fields__]
    tables = [table[0] if isinstance(table, tuple) else table for table in tables]
    known = [
        name for table in [*tables, settings.limits.account] for name in table.__struct_fields__
    ]
    known.remove("account")  # a table of its own
    assert sorted(names) == sorted(known)


def test_help_of_every_command() -> None:
    def walk(command: click.Command, path: list[str]) -> int:
        done = CliRunner().invoke(main.commands, [*path, "--help"], prog_name="redbtc-proxy")
        assert done.exit_code == 0
        assert "Usage: redbtc-proxy" in done.output
        assert command.help
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{path}: {option.name}"
        inner = command.commands if isinstance(command, click.Group) else {}
        return 1 + sum(walk(each, [*path, name]) for name, each in inner.items())

    assert walk(main.commands, []) > 25


def test_names_steer_neither_terminal_nor_spreadsheet(gateway: Gateway, key: str) -> None:
    with gateway.client(key) as client:
        client.post("/responses", json={"model": "a\x1b[31m\nb", "input": ""})
        client.post("/responses", json={"model": "=1+1", "input": ""})
    assert "a\\x1b[31m\\nb" in gateway.run("usage").stdout
    rows = csv.DictReader(io.StringIO(gateway.run("usage", "--csv").stdout))
    assert {row["requested_model"] for row in rows} == {"a\nb", "'=1+1"}


def test_migrations_run_in_order_and_once() -> None:
    text = "-- intro\n-- version 1\nCREATE a;\n-- version 2\nCREATE b;\n"
    assert migrations(text) == {1: "\nCREATE a;\n", 2: "\nCREATE b;\n"}
