"""What the Dockerfile and compose.yaml name is there, and Caddy serves what compose.yaml says.
`make test-image` builds and runs the image."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import signal
import ssl
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from redbtc.config import parse_settings
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, MakeGateway, free_port, wait_until
from tests.helpers.tools import needs

DOMAIN = "gateway.test"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def interpolated(text: str, **variables: str) -> str:
    """Return a text of compose.yaml as Compose reads it: ${NAME:-default}, and $$ for $."""
    replaced = re.sub(
        r"(?<!\$)\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text
    )
    return replaced.replace("$$", "$")


def copied() -> list[str]:
    """Return what the Dockerfile copies from the folder."""
    lines = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_the_image_gets_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert lines[1] == "*", "what is not named is left out"
    sources = copied()
    assert {"redbtc", "schema.sql", "deploy/container.toml"} <= {*sources}
    assert not [name for name in sources if not (ROOT / name).exists()]
    assert {name.partition("/")[0] for name in sources} == allowed
    ignored = [line for line in lines if line.startswith("**/")]
    for name in ("redbtc/__pycache__", "deploy/.env", "deploy/a.key", "redbtc/redbtc.db-wal"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


def test_dependencies_of_the_image_are_pinned() -> None:
    assert "--require-hashes -r /tmp/requirements.lock" in DOCKERFILE
    assert len(re.findall(r"\binstall (?!--)|\binstall\b.*-r", DOCKERFILE)) == 1, "no other package"


def test_the_settings_in_the_image_are_few_and_valid() -> None:
    tables = tomllib.loads((ROOT / "deploy" / "container.toml").read_text())
    parse_settings(tables)
    assert tables == {"server": {"host": "0.0.0.0"}, "database": {"path": "/data/redbtc.db"}}


def test_compose_contains_both_services_and_limits_them() -> None:
    gateway, caddy = COMPOSE["services"]["gateway"], COMPOSE["services"]["caddy"]
    assert "ports" not in gateway, "only Caddy reaches it"
    for service in (gateway, caddy):
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {each["source"] for each in service["configs"]} <= set(COMPOSE["configs"])
        volumes = {each.partition(":")[0] for each in service["volumes"]}
        assert volumes <= set(COMPOSE["volumes"])
    assert gateway["read_only"] is True
    assert gateway["stop_grace_period"] == "11m"
    settings = tomllib.loads(interpolated(COMPOSE["configs"]["gateway"]["content"]))
    assert parse_settings(settings).server.drain_seconds < 11 * 60
    (subnet,) = COMPOSE["networks"]["inside"]["ipam"]["config"]
    assert settings["server"]["trusted_proxies"] == [subnet["subnet"]]
    assert settings["server"]["public_url"] == "https://localhost"
    content = interpolated(COMPOSE["configs"]["gateway"]["content"], DOMAIN=DOMAIN)
    assert tomllib.loads(content)["server"]["public_url"] == f"https://{DOMAIN}"


@pytest.mark.slow
def test_caddy_serves_the_gateway_over_tls(make_gateway: MakeGateway, tmp_path: Path) -> None:
    """Caddy has a certificate of its own instead of a public one, and other ports."""
    caddy = needs("caddy")
    gateway = make_gateway().start("--demo")
    key = gateway.new_key()
    plain, tls = free_port(), free_port()
    options = f"{{\n admin off\n http_port {plain}\n https_port {tls}\n skip_install_trust\n"
    content = interpolated(COMPOSE["configs"]["caddy"]["content"])
    content = content.replace("{", options, 1).replace("gateway:8080", f"127.0.0.1:{gateway.port}")
    content = content.replace("{$DOMAIN} {", "{$DOMAIN} {\n tls internal", 1)
    (tmp_path / "Caddyfile").write_text(content)
    command = [caddy, "run", "--config", str(tmp_path / "Caddyfile"), "--adapter", "caddyfile"]
    env = {"DOMAIN": DOMAIN, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    authority = tmp_path / "caddy" / "pki" / "authorities" / "local" / "root.crt"
    try:
        wait_until(
            lambda: authority.exists() and "END CERTIFICATE" in authority.read_text(),
            why=log.read_text,
        )
        context = ssl.create_default_context(cafile=str(authority))
        with httpx2.Client(verify=context, timeout=PATIENCE_SECONDS, trust_env=False) as client:

            def answers() -> bool:
                """Return whether Caddy has its certificate; before that, it ends the handshake."""
                with contextlib.suppress(httpx2.ConnectError):
                    return client.get(f"{url}/healthz", **sent).status_code == 200
                return False

            url = f"https://127.0.0.1:{tls}"
            sent: dict[str, Any] = {
                "headers": {"authorization": f"Bearer {key}", "host": DOMAIN},
                "extensions": {"sni_hostname": DOMAIN},
            }
            body = {
                "model": "redbtc-demo",
                "messages": [{"role": "user", "content": "Hi."}],
                "stream": True,
            }
            wait_until(answers, why=log.read_text)
            answer = client.post(f"{url}/v1/chat/completions", json=body, **sent)
            assert answer.status_code == 200, answer.text
            assert answer.text.endswith("data: [DONE]\n\n")
            for path in ("/metrics", "/admin/v1/accounts"):
                assert client.get(f"{url}{path}", **sent).status_code == 404
            for path in ("/status", "/admin/v1/me"):
                assert client.get(f"{url}{path}", **sent).status_code == 200
            assert gateway.terminate() == 0
            with ThreadPoolExecutor() as pool:  # Caddy waits (2.6 not with a body)
                waiting = pool.submit(client.get, f"{url}/status", **sent)
                gateway.start("--demo")
                assert waiting.result().status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)
    assert [row["outcome"] for row in gateway.rows()] == ["completed"]
