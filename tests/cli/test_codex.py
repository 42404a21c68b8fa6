"""The commands codex config and codex catalog, and what check says of a catalogue."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from redbtc.codex.config_toml import offer_of
from redbtc.config import parse_settings, with_demo
from tests.helpers.codex import catalog_entry, catalog_text
from tests.helpers.credentials import settings_of, table
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.upstream import Received, Reply, Upstream, json_answer, openai_like

CATALOG = '[codex]\ncatalog = "codex-models.json"\n'
REFUSE = '[billing]\nunpriced_models = "refuse"\n'
ENTRIES = [
    catalog_entry("gpt-late", priority=2),
    catalog_entry("gpt-first", priority=1),
    catalog_entry("codex-hidden", priority=0, visibility="hide"),
    catalog_entry("not-in-api", priority=0, supported_in_api=False),
]


def provider(gateway: Gateway, *arguments: str) -> dict[str, Any]:
    """Return the configuration that the command prints, with the model among the provider's."""
    config = tomllib.loads(gateway.cli("codex", "config", *arguments)["config"])
    assert config["model_provider"] == "redbtc"
    return {"model": config["model"], **config["model_providers"]["redbtc"]}


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_the_configuration_follows_the_settings(make_gateway: MakeGateway, running: bool) -> None:
    gateway = make_gateway(REFUSE)
    if running:
        gateway.start()
    gateway.cli("price", "add", "*", "--input", "1", "--output", "1")
    base_url = f"{gateway.url}/v1"
    assert provider(gateway) == {
        "model": "gpt-6.1-sol",
        "name": "OpenAI",
        "base_url": base_url,
        "env_key": "REDBTC_API_KEY",
        "wire_api": "responses",
        "supports_websockets": True,
    }
    gateway.cli("account", "add", "a")
    gateway.cli("key", "add", "a", "--label", "one", "--models", "gpt-5.5,gpt-l*")
    assert provider(gateway, "--key", "one")["model"] == "gpt-5.5"
    (gateway.folder / "codex-models.json").write_text(catalog_text(*ENTRIES))
    public = '[server]\npublic_url = "https://ai.example.com/"\n'
    gateway.configure(public + CATALOG + REFUSE)
    if running:
        gateway.restart()
    found = provider(gateway)
    assert found["model"] == "gpt-first", "Codex offers it first"
    assert found["base_url"] == "https://ai.example.com/v1"
    assert found["model_catalog_url"] == "https://ai.example.com/v1/models"
    key_id = gateway.cli("key", "list", "a")["keys"][0]["id"]
    assert provider(gateway, "--key", key_id)["model"] == "gpt-late"
    gateway.cli("key", "add", "a", "--label", "one")
    refused = gateway.cli("codex", "config", "--key", "one", check=False)
    assert refused.returncode == 1
    assert "several keys have the label 'one'" in refused.stderr
    gateway.cli("key", "revoke", key_id)
    assert provider(gateway, "--key", "one")["model"] == "gpt-first"
    missing = gateway.cli("codex", "config", "--key", "two", check=False)
    assert missing.stderr == "Error: no key has the id or label 'two'\n"
    text = gateway.run("codex", "config").stdout
    assert text.startswith("# For ~/.codex/config.toml. ")
    assert tomllib.loads(text)["model"] == "gpt-first"


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_users_with_a_login_of_their_own(
    make_gateway: MakeGateway, upstream: Upstream, running: bool
) -> None:
    seats = table(upstream, "seats", models=["gpt-5.5"], credentials="client", websocket=False)
    operators = table(upstream, "operators", models=["gpt-6-sol"])
    gateway = make_gateway(settings_of(operators, seats))
    if running:
        gateway.start()
    assert provider(gateway)["model"] == "gpt-6-sol"
    assert provider(gateway)["env_key"] == "REDBTC_API_KEY"
    own = provider(gateway, "--own-login")
    base_url = own.pop("base_url")
    assert base_url == gateway.base_url
    assert own == {
        "model": "gpt-5.5",
        "name": "OpenAI",
        "requires_openai_auth": True,
        "env_http_headers": {"x-gateway-key": "REDBTC_API_KEY"},
        "wire_api": "responses",
        "supports_websockets": False,
    }
    gateway.configure(settings_of(seats))
    if running:
        gateway.restart()
    assert provider(gateway)["requires_openai_auth"] is True, "there are no other upstreams"
    gateway.configure(settings_of(operators))
    if running:
        gateway.restart()
    refused = gateway.cli("codex", "config", "--own-login", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "no upstream takes users' own logins" in refused.stderr


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_no_websocket_is_configured_where_none_is_offered(
    make_gateway: MakeGateway, running: bool
) -> None:
    gateway = make_gateway(upstream_settings="websocket = false")
    if running:
        gateway.start()
    assert provider(gateway)["supports_websockets"] is False


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_websocket_is_configured_if_the_model_has_it(
    make_gateway: MakeGateway, upstream: Upstream, running: bool
) -> None:
    """Not if only another model's upstream offers it: Codex would ask in vain, seven times."""
    post = table(upstream, "post", models=["gpt-*"], websocket=False)
    both = table(upstream, "both", models=["other-*", "gpt-5.5"])
    gateway = make_gateway(settings_of(post, both))
    if running:
        gateway.start()
    assert provider(gateway)["supports_websockets"] is False
    gateway.new_key()
    gateway.cli("key", "add", "test", "--label", "five", "--models", "gpt-5.5")
    assert provider(gateway, "--key", "five")["supports_websockets"] is True


def test_the_demonstration_has_no_websocket() -> None:
    demo = with_demo(parse_settings({}), "http://127.0.0.1:1/v1")
    assert not offer_of(demo, None, ()).websocket("redbtc-demo")


@pytest.mark.parametrize(
    ("models", "is_usable"),
    [("gpt-5.5", True), ("gpt-6*", True), ("nope*", False), ("gpt-none-*", False)],
)
def test_the_configuration_says_if_no_model_can_be_used(
    make_gateway: MakeGateway, upstream: Upstream, models: str, is_usable: bool
) -> None:
    billing = {"unpriced_models": "refuse"}
    upstreams = table(upstream, "u", models=["gpt-*"])
    gateway = make_gateway(settings_of(upstreams, billing=billing)).start()
    for pattern in ("gpt-5*", "gpt-6*"):
        gateway.cli("price", "add", pattern, "--input", "1", "--output", "1")
    gateway.new_key()
    gateway.cli("key", "add", "test", "--label", "one", "--models", models)
    text = gateway.run("codex", "config", "--key", "one").stdout
    assert ("can't be used" not in text) == is_usable
    assert tomllib.loads(text)["model"]


def shell_script(path: Path, output: str, status: int = 0) -> str:
    """Write a program that prints something, in place of Codex."""
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\necho a warning >&2\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def test_the_catalogue_is_written_only_if_it_is_valid(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    gateway = make_gateway()
    whole = catalog_text(*ENTRIES)
    good = shell_script(tmp_path / "good", whole)
    done = gateway.run("codex", "catalog", "--codex", os.path.relpath(good, gateway.folder))
    file = gateway.folder / "codex-models.json"
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text()) == json.loads(whole)
    assert f"Wrote {file}: 4 models, " in done.stdout
    assert '[codex]\ncatalog = "codex-models.json"' in done.stdout
    before = file.read_bytes()
    broken = {**ENTRIES[0]}
    del broken["priority"]
    for output, status, reason in (
        ("", 3, "failed with status 3: a warning"),
        ("Usage: codex", 0, "can't be used: expected what `codex debug models` prints"),
        ('{"data": []}', 0, "can't be used: expected what `codex debug models` prints"),
        (catalog_text(ENTRIES[1], broken), 0, "can't be used: model 'gpt-late': priority: missing"),
        (catalog_text(ENTRIES[1], ENTRIES[1]), 0, "can't be used: model 'gpt-first': duplicate"),
    ):
        bad = shell_script(tmp_path / "bad", output, status)
        done = gateway.run("codex", "catalog", "--codex", bad)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert reason in done.stderr
        assert file.read_bytes() == before
    done = gateway.run("codex", "catalog", "--codex", str(tmp_path / "none"))
    reason = "not found; give the path of Codex CLI with --codex PATH"
    assert done.stderr == f"Error: {tmp_path / 'none'}: {reason}\n"
    elsewhere = tmp_path / "no" / "x.json"
    done = gateway.run("codex", "catalog", "--codex", good, "--output", str(elsewhere))
    assert done.stderr == f"Error: {elsewhere}: No such file or directory\n"
    gateway.configure('[codex]\ncatalog = "own.json"\n')
    made = gateway.cli("codex", "catalog", "--codex", good)
    assert made["file"] == str(gateway.folder / "own.json")
    assert made["models"] == [entry["slug"] for entry in ENTRIES]
    assert sorted(each.name for each in gateway.folder.glob("*.json*")) == [
        "codex-models.json",
        "own.json",
    ]


def test_codex_gets_nothing_of_its_users_configuration(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    gateway = make_gateway(CODEX_HOME=str(tmp_path), OPENAI_API_KEY="sk-canary")
    program = tmp_path / "codex"
    program.write_text(f'#!/bin/sh\nenv > "{tmp_path}/env"; pwd >> "{tmp_path}/env"\n')
    program.chmod(0o755)
    gateway.run("codex", "catalog", "--codex", str(program))
    given = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().split("\n")[:-2])
    assert "sk-canary" not in given.values()
    assert given["CODEX_HOME"] == given["HOME"] != str(tmp_path)
    assert not Path(given["HOME"]).exists(), "it was temporary"


def test_check_reads_the_catalogue(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(CATALOG + REFUSE)
    file = gateway.folder / "codex-models.json"

    def check(*entries: dict[str, Any]) -> tuple[list[str], list[str]]:
        file.write_text(catalog_text(*entries))
        done = gateway.cli("check", check=False)
        found = json.loads(done.stdout)
        assert done.returncode == (2 if found["problems"] else 0)
        notes = [note for note in found["notes"] if note.startswith("codex.catalog: ")]
        return found["problems"], notes

    names = "gpt-late, gpt-first, codex-hidden, not-in-api"
    unpriced = "codex.catalog: these models have no price and are left out: "
    assert check(*ENTRIES) == ([], [unpriced + names])
    gateway.cli("price", "add", "gpt-*", "--input", "1", "--output", "1")
    gateway.cli("price", "add", "not-in-api", "--tier", "flex", "--input", "1", "--output", "1")
    assert check(*ENTRIES) == ([], [f"{unpriced}codex-hidden, not-in-api"])
    broken = {**ENTRIES[0], "priority": "high"}
    less = {**ENTRIES[1]}
    del less["shell_type"], less["slug"]
    assert check(ENTRIES[2], broken, less) == (
        [
            f"codex.catalog: {file}: model 'gpt-late': priority: expected `int`, got `str`",
            f"codex.catalog: {file}: models[2]: slug: missing",
        ],
        [],
    )
    odd = catalog_entry("gpt-odd", shell_type="zsh", input_modalities=["text", "smell"])
    problems, notes = check(odd)
    assert not problems
    assert [note.partition(", which Codex ")[0] for note in notes] == [
        "codex.catalog: model 'gpt-odd': shell_type is 'zsh'",
        "codex.catalog: model 'gpt-odd': input_modalities is 'smell'",
    ]
    long = [{**entry, "base_instructions": "x" * 600_000} for entry in ENTRIES]
    problems, _ = check(*long)
    assert len(problems) == 1
    assert (
        "bytes for a key that may use all models; Codex may ignore more than 1048576" in problems[0]
    )
    assert check(*long[:1], *long[2:]) == ([], [f"{unpriced}codex-hidden, not-in-api"])
    file.unlink()
    done = gateway.cli("check", check=False)
    assert json.loads(done.stdout)["problems"] == [
        f"codex.catalog: {file}: No such file or directory"
    ]


def test_check_fetches_a_catalogue_with_the_upstreams(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(f'[codex]\ncatalog = "{upstream.url}/models"\n')
    answers = {
        catalog_text(*ENTRIES): "",
        '{"models": [1]}': "models[0]: expected `object`, got `int`",
        "": "expected what `codex debug models` prints",
    }
    for text, reason in answers.items():

        async def script(request: Received, reply: Reply, text: str = text) -> None:
            if "client_version=" not in request.path:
                await openai_like(request, reply)
            else:
                await json_answer(text.encode())(request, reply)

        upstream.script = script
        assert gateway.cli("check")["ok"], "it is not fetched"
        done = gateway.cli("check", "--upstreams", check=False)
        problems = json.loads(done.stdout)["problems"]
        assert done.returncode == (2 if reason else 0)
        assert len(problems) == bool(reason)
        assert not reason or reason.lower() in problems[0].lower()


def test_a_wrong_address_is_refused(make_gateway: MakeGateway, upstream: Upstream) -> None:
    for wrong in ("https://", "http://a b/models", "https://u:p@example.com/models", "ftp://a/b"):
        gateway = make_gateway(f'[codex]\ncatalog = "{wrong}"\n')
        done = gateway.run("check")
        assert done.returncode == 2
        assert f"codex.catalog: found {wrong!r}; not a valid URL" in done.stdout
