"""Codex CLI, run against a gateway, and what an upstream answers to it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway
from tests.helpers.tools import NODE_MODULES, needs
from tests.helpers.upstream import response_object

NEWEST, PINNED = "0.171.0", "0.169.0"  # as tests/package.json names them


def codex_program(version: str = NEWEST) -> str:
    """Return the path of a version of Codex CLI; see `needs`."""
    if version == NEWEST:
        return needs("codex")
    path = NODE_MODULES / "codex-0-169" / "bin" / "codex.js"
    return str(path) if path.exists() else needs("codex 0.169.0")


def run_codex(
    home: Path, *arguments: str, version: str = NEWEST, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Codex CLI with its own home, and nothing else of the environment."""
    return subprocess.run(
        [codex_program(version), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "CODEX_HOME": str(home), **env},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


PROVIDER = """
model = "gpt-5.5"
model_provider = "gw"
[model_providers.gw]
name = "Gateway"
base_url = "{url}"
env_key = "GW_API_KEY"
wire_api = "responses"
"""
BUILT_IN = 'model = "gpt-5.5"\nopenai_base_url = "{url}"\n'


def codex(
    gateway: Gateway,
    key: str,
    home: Path,
    prompt: str,
    settings: str = PROVIDER,
    version: str = NEWEST,
) -> list[dict[str, Any]]:
    """Let Codex CLI do a task, and return the events that it prints."""
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(settings.replace("{url}", gateway.base_url))
    names = ["GW_API_KEY", "REDBTC_API_KEY"] if "env_key" in settings else ["CODEX_API_KEY"]
    keys = dict.fromkeys(names, key)
    arguments = ["exec", "--skip-git-repo-check", "--json", prompt]
    done = run_codex(home, *arguments, version=version, **keys)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


CALL = {
    "id": "fc_1",
    "type": "function_call",
    "status": "completed",
    "call_id": "call_1",
    "name": "exec_command",
    "arguments": json.dumps({"cmd": "echo from-the-tool"}),
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "All done.", "annotations": []}],
}


def turn_events(number: int, item: dict[str, Any] | None) -> list[dict[str, Any]]:
    used = {
        "input_tokens": 1000 + number,
        "input_tokens_details": {"cached_tokens": 10},
        "output_tokens": 20 if item else 0,
        "output_tokens_details": {"reasoning_tokens": 8 if item else 0},
        "total_tokens": 0,
    }
    output = [item] if item else []
    last = response_object("gpt-5.5", used, id=f"resp_{number}", output=output)
    begun = response_object("gpt-5.5", None, "in_progress", id=last["id"], output=[])
    middle = [
        {"type": f"response.output_item.{step}", "output_index": 0, "item": item}
        for step in ("added", "done")
        if item
    ]
    return [
        {"type": "response.created", "response": begun},
        *middle,
        {"type": "response.completed", "response": last},
    ]


def catalog_entry(slug: str, **more: Any) -> dict[str, Any]:
    """Return an entry of Codex CLI's model catalogue with all that Codex requires."""
    return {
        "slug": slug,
        "display_name": slug.upper(),
        "supported_reasoning_levels": [{"effort": "low", "description": "Quick"}],
        "shell_type": "unified_exec",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 1,
        "support_verbosity": True,
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "experimental_supported_tools": [],
        "base_instructions": "Be brief.",
        **more,
    }


def catalog_text(*entries: dict[str, Any]) -> str:
    """Return a catalogue, spelled as no encoder would, so that other bytes are noticed."""
    return json.dumps({"models": entries}, separators=(" , ", ": "), indent=1)


def chatgpt_tokens() -> dict[str, str]:
    """Return tokens with which Codex CLI takes its user to be logged in to ChatGPT."""
    about = {"chatgpt_plan_type": "pro", "chatgpt_account_id": "acc_1", "chatgpt_user_id": "user_1"}
    claims = {"email": "a@example.com", "exp": 4_102_444_800, "https://api.openai.com/auth": about}
    parts = [json.dumps(part).encode() for part in ({"alg": "none", "typ": "JWT"}, claims)]
    token = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in [*parts, b"s"])
    own = {"refresh_token": "refresh", "account_id": "acc_1"}
    return {"id_token": token, "access_token": token, **own}
