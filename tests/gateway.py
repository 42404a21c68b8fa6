"""The real gateway as a child process, with its settings, commands, log and ledger at hand."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM_KEY = "sk-upstream-canary-0123456789"


def wait_until(condition: Callable[[], Any], seconds: float = 10, why: str = "") -> None:
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience, f"waited {seconds} s in vain {why}"
        time.sleep(0.005)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Gateway:
    """`settings` is TOML text put before the upstream's table; `upstream_settings` goes into it."""

    def __init__(
        self,
        folder: Path,
        upstream_url: str,
        settings: str = "",
        upstream_settings: str = "",
        **env: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.base_url = f"{self.url}/v1"
        self.config = folder / "config.toml"
        self.database = folder / "redbtc.db"
        self._log = folder / "stderr"
        self._env = {**os.environ, "TEST_UPSTREAM_KEY": UPSTREAM_KEY, **env}
        self._env.pop("REDBTC_CONFIG", None)
        self._upstream = (upstream_url, upstream_settings)
        self.process: subprocess.Popen[bytes] | None = None
        self.expected_dead = False
        self.configure(settings)

    def configure(self, settings: str = "") -> None:
        if "[server]" not in settings:
            settings = f"[server]\n{settings}"
        settings = settings.replace("[server]", f"[server]\nport = {self.port}", 1)
        if "[[upstreams]]" not in settings:
            url, more = self._upstream
            settings += (
                f'\n[[upstreams]]\nname = "test"\nbase_url = "{url}"\n'
                f'api_key_env = "TEST_UPSTREAM_KEY"\n{more}\n'
            )
        self.config.write_text(settings)

    def command(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "redbtc_proxy.py"),
            "--config",
            str(self.config),
            *arguments,
        ]

    # The process

    def start(self, *arguments: str, wait: bool = True) -> Gateway:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("serve", *arguments),
                env=self._env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
            )
        self.expected_dead = False
        if wait:
            wait_until(self._answers, 20, f"for the gateway to start: {self.log()}")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the gateway did not start: {self.log()}"
        try:
            return httpx2.get(f"{self.url}/healthz", trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        assert self.process is not None
        self.expected_dead = True
        self.process.kill()
        self.process.wait()

    def terminate(self, seconds: float = 20) -> int:
        assert self.process is not None
        self.expected_dead = True
        self.process.terminate()
        return self.process.wait(seconds)

    def close(self) -> None:
        """End it, after making sure that it had not ended by itself."""
        if self.process is None:
            return
        died = not self.alive() and not self.expected_dead
        if self.alive():
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        assert not died, f"the gateway died: {self.log()}"
        assert "Traceback" not in self.log(), self.log()
        assert '"level":"error","event":"request"' not in self.log(), self.log()

    # What it shows

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self._env,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
        )

    def cli(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Call the running gateway's admin API directly: what commands do, without their start."""
        transport = httpx2.HTTPTransport(uds=f"{self.database}.sock")
        with httpx2.Client(transport=transport, base_url="http://gateway", timeout=60) as client:
            answer = client.request(method, f"/admin/v1{path}", json=body)
            assert answer.status_code < 400, answer.text
            return answer.json()

    def new_key(self, account: str = "test", **limits: int) -> str:
        """A key of an account, which is made with these limits if it is not there yet."""
        names = [each["name"] for each in self.api("GET", "/accounts")["accounts"]]
        if account not in names:
            self.api("POST", "/accounts", {"name": account, **limits})
        return str(self.api("POST", f"/accounts/{account}/keys")["key"])

    def rows(self) -> list[dict[str, Any]]:
        """The ledger, of a running gateway or of a stopped one."""
        found = self.api("GET", "/requests") if self.alive() else self.cli("usage")
        rows: list[dict[str, Any]] = found["requests"]
        return rows

    def row(self, request_id: str | None = None) -> dict[str, Any]:
        """The one row there is, or that of a request id."""
        rows = [row for row in self.rows() if request_id in (None, row["request_id"])]
        assert len(rows) == 1, rows
        return rows[0]

    def metrics(self) -> dict[str, float]:
        text = httpx2.get(f"{self.url}/metrics", trust_env=False).text
        lines = (line.rpartition(" ") for line in text.splitlines() if line[:1] not in ("#", ""))
        return {name: float(value) for name, _, value in lines}

    def client(self, key: str, **options: Any) -> httpx2.Client:
        usual = {"timeout": 30, "trust_env": False}
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.base_url, headers=headers, **{**usual, **options})

    def raw(self, data: bytes, seconds: float = 5) -> bytes:
        """Send bytes; all that is answered until the connection ends or nothing more comes."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as sock:
            try:
                sock.sendall(data)
                while part := sock.recv(65536):
                    answer += part
                    match = re.search(rb"content-length: (\d+)\r\n", answer)
                    end = answer.find(b"\r\n\r\n")
                    if match and end >= 0 and len(answer) >= end + 4 + int(match[1]):
                        break
            except (TimeoutError, ConnectionError):
                pass
        return answer

    @property
    def _process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def open_files(self) -> int:
        return int(self._process.num_fds())

    def rss(self) -> int:
        return int(self._process.memory_info().rss)
