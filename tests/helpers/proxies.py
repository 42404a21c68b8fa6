"""The proxies that deploy/ has configurations for, run as those say but for names, ports and
certificates."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.helpers.certificates import Authority
from tests.helpers.gateway import ROOT, USUAL, free_port, wait_until
from tests.helpers.tools import needs

DEPLOY = ROOT / "deploy"
HEAD_SECONDS = 2  # for the head of a request, in place of ten
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass
class Proxy:
    """A proxy that runs, with TLS for localhost."""

    port: int
    plain_port: int  # without TLS
    authority: Path  # the certificate that its clients trust
    folder: Path
    log: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def context(self) -> ssl.SSLContext:
        """Return a client's TLS context."""
        return ssl.create_default_context(cafile=self.authority)

    def client(self, http2: bool = True, address: str = "127.0.0.1") -> httpx2.Client:
        """Return a client at this address of loopback."""
        transport = httpx2.HTTPTransport(
            verify=self.context(), http2=http2, local_address=address, trust_env=False
        )
        return httpx2.Client(base_url=self.url, transport=transport, **USUAL)


def replaced(name: str, *changes: tuple[str, str]) -> str:
    """Return a file of deploy/ with changes. Each of the old texts must be in it."""
    text = (DEPLOY / name).read_text()
    for old, new in changes:
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    return text


def nginx_command(
    folder: Path, port: int, plain: int, gateway: int, certificate: Path
) -> list[str]:
    """Write the configuration of nginx, and return the command that runs it."""
    site = replaced(
        "nginx.conf",
        ("listen [::]:443 ssl http2;\n", "\n"),
        ("listen [::]:80;\n", "\n"),
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("listen 80;", f"listen 127.0.0.1:{plain};"),
        ("api.example.com;", "localhost;"),
        ("/etc/letsencrypt/live/api.example.com/fullchain.pem", str(certificate)),
        ("/etc/letsencrypt/live/api.example.com/privkey.pem", str(certificate)),
        ("server 127.0.0.1:8080;", f"server 127.0.0.1:{gateway};"),
        ("client_header_timeout 10s", f"client_header_timeout {HEAD_SECONDS}s"),
    )
    paths = "".join(f"{name}_temp_path {name};\n" for name in TEMPORARY)
    (folder / "nginx.conf").write_text(
        "daemon off; pid nginx.pid; error_log stderr; worker_processes 1;\n"
        f"events {{}}\nhttp {{\n{paths}{site}}}\n"
    )
    return [needs("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]


def caddy_command(
    folder: Path, port: int, plain: int, gateway: int, certificate: Path
) -> list[str]:
    """Write the configuration of Caddy, and return the command that runs it."""
    site = replaced(
        "Caddyfile",
        ("{\n\tservers {", f"{{\n\tadmin off\n\thttp_port {plain}\n\tservers {{"),
        ("http://api.example.com {", f"http://localhost:{plain} {{"),
        (
            "\napi.example.com {",
            f"\nhttps://localhost:{port} {{\n\ttls {certificate} {certificate}",
        ),
        ("reverse_proxy 127.0.0.1:8080", f"reverse_proxy 127.0.0.1:{gateway}"),
        ("read_header 10s", f"read_header {HEAD_SECONDS}s"),
    )
    (folder / "Caddyfile").write_text(site)
    return [needs("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


COMMANDS: dict[str, Callable[[Path, int, int, int, Path], list[str]]] = {
    "nginx": nginx_command,
    "caddy": caddy_command,
}


@contextlib.contextmanager
def running_proxy(name: str, folder: Path, gateway: int, authority: Authority) -> Iterator[Proxy]:
    """Run a proxy in front of the gateway at a port."""
    folder.mkdir()
    folder.chmod(0o755)
    port, plain, log = free_port(), free_port(), folder / "log"
    command = COMMANDS[name](folder, port, plain, gateway, authority.server)
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **home}, cwd=folder, stdout=output, stderr=output
        )
    proxy = Proxy(port, plain, authority.file, folder, log)

    def up() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_until(up, why=log.read_text)
        yield proxy
    finally:
        process.terminate()
        process.wait()
