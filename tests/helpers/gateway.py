"""The real gateway as a child process, with its settings, commands, log and ledger at hand."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import IO, Any, Protocol

import httpx2
import psutil

from tests.helpers.fork_server import Forked, ForkServer
from tests.helpers.log_events import undocumented

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM_KEY = "sk-upstream-canary-0123456789"
# Code that a gateway runs first (Gateway.prelude), where a test is of single steps of work: a full
# collection, which can come at any time, takes 25 to 60 units.
WITHOUT_COLLECTIONS = "import gc; gc.disable()"
PATIENCE_SECONDS = 150  # for operations that usually take a second or two
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else each client reads all certificates, 27 ms
USUAL: dict[str, Any] = {"timeout": PATIENCE_SECONDS, "trust_env": False, "verify": NO_TLS}


def wait_until(
    condition: Callable[[], Any],
    seconds: float = PATIENCE_SECONDS,
    why: str | Callable[[], str] = "",
) -> None:
    """Return once the condition holds. `why` is the message of the failure if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            said = why if isinstance(why, str) else why()
            raise AssertionError(f"waited {seconds} s in vain {said}")
        time.sleep(0.005)


def wait_for_length(things: Sized, length: int) -> None:
    """Wait until there are at least `length` things."""
    wait_until(lambda: len(things) >= length, why=lambda: f"for {length}; there are {len(things)}")


def free_port() -> int:
    """Return a port on which nothing listens. It is below the ephemeral ports, so that no
    connection takes it before its server is up; the workers of pytest-xdist draw from different
    ports."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(10_000, 32_000, 8) + worker % 8
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def toml(tables: Mapping[str, Any], path: str = "") -> str:
    """TOML text of nested dicts; a list of dicts is an array of tables."""
    plain, nested = [], []
    for name, value in tables.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            nested.append(f"[{where}]\n{toml(value, where)}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            nested += [f"[[{where}]]\n{toml(each, where)}" for each in value]
        else:
            plain.append(f"{name} = {json.dumps(value)}\n")
    return "".join(plain + nested)


RUN = """
import os, runpy, sys
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Process(Protocol):
    """A process, as subprocess.Popen has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float = ..., /) -> int: ...

    def send_signal(self, sig: int, /) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Gateway:
    """`settings` is TOML text put before the upstream's table, or the same as nested dicts;
    `upstream_settings` goes into that table. `env` is added to the environment."""

    fork_server: ForkServer | None = None  # forks the process, unless Python has to start anew
    prelude = ""  # Python code that the serving process runs first
    wrapper: Sequence[str] = ()  # a command that runs what follows it, such as setpriv

    def __init__(
        self,
        folder: Path,
        upstream_url: str,
        settings: str | Mapping[str, Any] = "",
        upstream_settings: str = "",
        root: Path = ROOT,
        **env: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._script = str(root.absolute() / "redbtc_proxy.py")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.base_url = f"{self.url}/v1"
        self.config = folder / "config.toml"
        self.database = folder / "redbtc.db"
        self._log = folder / "stderr"
        self._env = {**os.environ, "TEST_UPSTREAM_KEY": UPSTREAM_KEY, **env}
        self._env.pop("REDBTC_CONFIG", None)
        self._upstream = (upstream_url, upstream_settings)
        self.process: Process | None = None
        self.past: list[Process] = []  # the processes from which others have taken over
        self.expected_dead = False
        self._is_documented = root == ROOT
        self.configure(settings)

    def configure(self, settings: str | Mapping[str, Any] = "") -> None:
        """Write the settings file; a running gateway reads it at SIGHUP."""
        if not isinstance(settings, str):
            settings = toml(settings)
        if "[server]" not in settings:
            settings = f"[server]\n{settings}"
        settings = settings.replace("[server]", f"[server]\nport = {self.port}", 1)
        if "[billing]" not in settings:  # most tests are not about money
            settings = f'{settings}\n[billing]\nunpriced_models = "free"\n'
        if "[[upstreams]]" not in settings:
            url, more = self._upstream
            settings += (
                f'\n[[upstreams]]\nname = "test"\nbase_url = "{url}"\n'
                f'api_key_env = "TEST_UPSTREAM_KEY"\n{more}\n'
            )
        self.config.write_text(settings)

    def set_variable(self, name: str, value: str) -> None:
        """Set a variable of the environment for the next start."""
        self._env[name] = value

    def command(self, *arguments: str) -> list[str]:
        prelude = ["-c", self.prelude + RUN] if self.prelude and "serve" in arguments else []
        return [
            *self.wrapper,
            sys.executable,
            *prelude,
            self._script,
            "--config",
            str(self.config),
            *arguments,
        ]

    # The process

    def start(self, *arguments: str, wait: bool = True) -> Gateway:
        with self._log.open("ab") as log, open(os.devnull) as nothing:
            self.process = self._start(self.command("serve", *arguments), nothing, log)
        self.expected_dead = False
        if wait:
            wait_until(self._answers, why=lambda: f"for the gateway to start: {self.log()}")
        return self

    def _start(
        self, command: list[str], nothing: IO[str], log: IO[bytes]
    ) -> subprocess.Popen[bytes] | Forked:
        if server := self._fork_server_for(command):
            files = [nothing.fileno(), log.fileno(), log.fileno()]
            return server.start(command[1:], self._env, self.folder, files)
        return subprocess.Popen(
            command, env=self._env, cwd=self.folder, stdin=nothing, stdout=log, stderr=log
        )

    def _fork_server_for(self, command: list[str]) -> ForkServer | None:
        """Return the fork server, if no other Python, code or library is asked for."""
        plain = command[:2] == [sys.executable, self._script]
        loaded = ("PYTHONPATH", "LD_PRELOAD")
        usual = all(self._env.get(name) == os.environ.get(name) for name in loaded)
        return self.fork_server if plain and usual else None

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the gateway did not start: {self.log()}"
        try:
            return self.get("/healthz").status_code == 200
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

    def terminate(self, wait: bool = True) -> int | None:
        """Its exit status, or None where it is not waited for."""
        assert self.process is not None
        self.expected_dead = True
        self.process.terminate()
        return self.wait() if wait else None

    def wait(self) -> int:
        """Wait until the gateway has ended; return its exit status."""
        assert self.process is not None
        self.expected_dead = True
        return self.process.wait(PATIENCE_SECONDS)

    def restart(self) -> Gateway:
        """End it as an operator would, if it runs, and start it again."""
        if self.alive():
            status = self.terminate()
            assert status == 0, f"exit status {status}: {self.log()}"
        return self.start()

    def close(self) -> None:
        """End it, after making sure that it had not ended by itself."""
        if self.process is None:
            return
        for each in self.past:
            each.kill()
            each.wait()
        died = not self.alive() and not self.expected_dead
        if self.alive():
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        assert not died, f"the gateway died: {self.log()}"
        assert "Traceback" not in self.log(), self.log()
        assert '"level":"error","event":"request"' not in self.log(), self.log()
        assert '"event":"unexpected error"' not in self.log(), self.log()
        wrong = undocumented(self.log()) if self._is_documented else []
        assert not wrong, f"docs/operating.md does not describe what was logged: {wrong}"

    # What it shows

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def flushed_log(self) -> str:
        """Return the log with all that was said before: it is written a moment later, in order."""
        marker = self.get("/marker").headers["x-redbtc-request-id"]
        wait_until(lambda: marker in self.log())
        return self.log()

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until `text` is in the log at least so many times."""
        wait_until(lambda: self.log().count(text) >= times, why=self.log)

    def wait_for_rows(self, number: int) -> None:
        """Wait until the ledger has `number` rows."""
        wait_until(lambda: len(self.rows()) == number)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        if server := self._fork_server_for(command):
            return server.run(command[1:], self._env, self.folder, PATIENCE_SECONDS)
        return subprocess.run(
            command,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            cwd=self.folder,
        )

    def cli(self, *arguments: str, check: bool = True) -> Any:
        """What a command prints with --json; without `check` the CompletedProcess."""
        done = self.run(*arguments, "--json")
        if not check:
            return done
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def api(self, method: str, path: str, body: Any = None, **query: str | int) -> Any:
        """Call the running gateway's admin API directly: what commands do, without their start."""
        transport = httpx2.HTTPTransport(verify=NO_TLS, uds=f"{self.database}.sock")
        with httpx2.Client(
            transport=transport, base_url="http://gateway", timeout=PATIENCE_SECONDS
        ) as client:
            answer = client.request(method, f"/admin/v1{path}", json=body, params=query)
            assert answer.status_code < 400, answer.text
            return answer.json()

    def new_key(self, account: str = "test", **limits: int | str) -> str:
        """A key of an account, which is made with these limits if it is not there yet."""
        if not self.alive():
            return self._new_key_offline(account, limits)
        names = [each["name"] for each in self.api("GET", "/accounts")["accounts"]]
        if account not in names:
            self.api("POST", "/accounts", {"name": account, **limits})
        return str(self.api("POST", f"/accounts/{account}/keys")["key"])

    def _new_key_offline(self, account: str, limits: Mapping[str, int | str]) -> str:
        if account not in [each["name"] for each in self.cli("account", "list")["accounts"]]:
            options = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
            self.cli("account", "add", account, *options)
        return str(self.cli("key", "add", account)["key"])

    def rows(self, **filters: str | int) -> list[dict[str, Any]]:
        """The ledger, of a running gateway or of a stopped one. Filters are the options of `usage`
        that narrow it: account, key, model, since, until, limit."""
        if self.alive():
            found = self.api("GET", "/requests", **filters)
        else:
            found = self.cli("usage", *[f"--{name}={value}" for name, value in filters.items()])
        rows: list[dict[str, Any]] = found["requests"]
        return rows

    def row(self, request_id: str | None = None) -> dict[str, Any]:
        """The one row there is, or that of a request id."""
        rows = [row for row in self.rows() if request_id in (None, row["request_id"])]
        assert len(rows) == 1, rows
        return rows[0]

    def metrics(self) -> dict[str, float]:
        text = self.get("/metrics").text
        lines = (line.rpartition(" ") for line in text.splitlines() if line[:1] not in ("#", ""))
        return {name: float(value) for name, _, value in lines}

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """Without a key."""
        return httpx2.get(f"{self.url}{path}", **{**USUAL, **options})

    def client(self, key: str, **options: Any) -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.base_url, headers=headers, **{**USUAL, **options})

    def raw(
        self, data: bytes, read_seconds: float = PATIENCE_SECONDS, until_close: bool = False
    ) -> bytes:
        """Send bytes; all that is answered until the connection ends or nothing more comes. An
        answer that is complete by its Content-Length ends it, too, unless `until_close`."""
        answer = b""
        with self.connect() as sock:
            sock.settimeout(read_seconds)
            try:
                sock.sendall(data)
                while part := sock.recv(65536):
                    answer += part
                    head, end, body = answer.partition(b"\r\n\r\n")
                    match = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                    length = 0 if data.startswith(b"HEAD ") else int(match[1]) if match else None
                    whole = end and length is not None and len(body) >= length
                    if whole and not until_close:
                        break
            except (TimeoutError, ConnectionError):
                pass
        return answer

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)

    def begin(self, key: str, body: Any, path: str = "/responses") -> socket.socket:
        """Send a request on a new connection, which the caller closes, and return the
        connection."""
        content = json.dumps(body).encode()
        head = (
            f"POST /v1{path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        sock = self.connect()
        sock.sendall(head.encode() + content)
        return sock

    def connections(self) -> int:
        """Return how many client connections the gateway has."""
        found = self._process.net_connections("tcp")
        return sum(each.laddr.port == self.port and bool(each.raddr) for each in found)

    @property
    def _process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def open_files(self) -> int:
        return int(self._process.num_fds())

    def rss(self) -> int:
        return int(self._process.memory_info().rss)


MakeGateway = Callable[..., Gateway]
