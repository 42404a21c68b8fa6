"""The container image, built by buildah and run as an operator would: `make test-image`.

It is not part of `make test`: it needs root, buildah and debootstrap, and takes some minutes. Tests
can't reach a registry of images, so the base image is a Debian that debootstrap makes, or the one
in the folder REDBTC_TEST_BASE. The container has namespaces of its own for mounts and processes, no
capabilities and a root file system that can't be written to, but the network of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from packing.source import exported
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, USUAL, free_port, wait_until
from tests.helpers.tools import needs

CANARY = "canary-of-the-image-0123456789"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
RELEASE = "bookworm"
# Runs as the first process of its namespace: $1 is the root, $2 the folder for /data, $3 the user.
ENTER = """
set -e
mount --bind "$1" "$1"; mount --bind "$2" "$1/data"; mount --bind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount -o remount,bind,ro "$1"
cd "$1"; user=$3; shift 3
exec setpriv --bounding-set=-all,+sys_chroot,+setuid,+setgid --inh-caps=-all --no-new-privs \
    chroot --userspec="$user" --groups= . "$@"
"""


class Buildah:
    """Buildah with a store of its own."""

    def __init__(self, folder: Path) -> None:
        self._command = [needs("buildah"), "--storage-driver", "vfs"]
        self._command += ["--root", str(folder / "root"), "--runroot", str(folder / "run")]

    def __call__(self, *arguments: str | Path, **env: str) -> str:
        command = [*self._command, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    assert os.geteuid() == 0, "building an image by chroot needs root"
    folder = tmp_path_factory.mktemp("buildah")
    yield Buildah(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def base(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base image with the Python of Debian."""
    made = os.environ.get("REDBTC_TEST_BASE")
    folder = Path(made) if made else tmp_path_factory.mktemp("base")
    if not made:
        packages = "--include=python3,python3-venv,ca-certificates"
        command = [needs("debootstrap"), "--variant=minbase", packages, RELEASE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    container = buildah("from", "scratch")
    subprocess.run(["cp", "-a", f"{folder}/.", buildah("mount", container)], check=True)
    buildah("commit", container, "localhost/base")
    buildah("rm", container)
    return "localhost/base"


@pytest.fixture(scope="module")
def image(buildah: Buildah, base: str) -> str:
    """The image, built in a folder that also has secrets, with one in the environment."""
    with exported(ROOT) as source:
        places = [".env", "deploy/.env", "deploy/tls.key", "redbtc.db", "redbtc/a.db-wal", "notes"]
        for name in places:
            (source / name).write_text(CANARY)
        mounted = f"{CERTIFICATES}:{CERTIFICATES}:ro"
        command = ["bud", "--isolation", "chroot", "--format", "docker"]
        command += ["--build-arg", f"BASE={base}", "--volume", mounted, "--tag", "redbtc-proxy"]
        buildah(*command, source, OPENAI_API_KEY=CANARY)
    return "localhost/redbtc-proxy"


@pytest.fixture(scope="module")
def config(buildah: Buildah, image: str) -> dict[str, Any]:
    """What the image says of how it is to be run."""
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", image))
    return dict(found["Docker"]["config"])


@pytest.fixture(scope="module")
def files(buildah: Buildah, image: str) -> Path:
    """The root of a container, without a shell: none is needed to run it."""
    root = Path(buildah("mount", buildah("from", image)))
    for name in ("sh", "bash", "dash", "env"):
        (root / "usr" / "bin" / name).unlink()
    return root


class Container:
    """A running container, with its output in a file. `data` is the volume of /data."""

    def __init__(self, config: dict[str, Any], root: Path, data: Path, **env: str) -> None:
        self._config, self._root, self._data = config, root, data
        self._env = dict(each.split("=", 1) for each in config["Env"]) | env
        if not data.exists():  # as Docker makes a volume: with the owner and mode in the image
            subprocess.run(["cp", "-a", root / "data", data], check=True)
        self._log = data.with_suffix(".log")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def command(self, *words: str) -> list[str]:
        """Return the words that run a command as the first process of new namespaces."""
        unshare = [needs("unshare"), "--mount", "--pid", "--fork", "--kill-child"]
        enter = ["sh", "-c", ENTER, "sh", str(self._root), str(self._data), self._config["User"]]
        return [*unshare, *enter, *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside what runs already."""
        command, env = self.command(*words), self._env
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[Container]:
        """Run what the image runs, until it is terminated or the block ends."""
        words = [*self._config["Entrypoint"], *self._config["Cmd"], "--port", str(self.port)]
        command, env = self.command(*words), self._env
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            wait_until(lambda: "Dashboard" in self.log() or self.process.poll(), why=self.log)
            assert self.process.poll() is None, self.log()
            yield self
        finally:
            self.process.kill()
            self.process.wait()

    @property
    def first(self) -> psutil.Process:
        """The first process in the container."""
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def terminate(self) -> int:
        """Send SIGTERM to the first process, as `docker stop` does, and return its exit status."""
        self.first.terminate()
        return self.process.wait(PATIENCE_SECONDS)

    def log(self) -> str:
        return self._log.read_text()

    def key(self) -> str:
        """The API key in the output."""
        (found,) = re.findall(r"^API key    (\S+)", self.log(), re.MULTILINE)
        return str(found)

    def chat(self, key: str) -> httpx2.Response:
        body = {"model": "redbtc-demo", "messages": [{"role": "user", "content": "Say hello."}]}
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, **USUAL)


def test_the_image_says_how_to_run_it(config: dict[str, Any]) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", config["User"]), "Kubernetes needs a number"
    assert list(config["Volumes"]) == ["/data"]
    assert list(config["ExposedPorts"]) == ["8080/tcp"]
    assert config["Entrypoint"] == ["redbtc-proxy"]
    assert config["Healthcheck"]["Test"][0] == "CMD", "not CMD-SHELL"
    assert config["Labels"]["org.opencontainers.image.title"] == "redbtc-proxy"


def test_no_secret_is_in_a_layer(buildah: Buildah, image: str, files: Path) -> None:
    found = subprocess.run(["grep", "-rl", CANARY, files], capture_output=True, text=True)
    assert found.stdout == ""
    assert CANARY not in buildah("inspect", "--type", "image", image)
    app = files / "opt" / "redbtc-proxy" / "app"
    names = {path.name for path in app.iterdir()} - {"__pycache__"}
    shipped = {"redbtc_proxy.py", "redbtc", "schema.sql", "config.toml", "prices.toml", "deploy"}
    assert names == shipped


def test_nobody_else_can_write_to_the_program(files: Path) -> None:
    for path in [*(files / "opt").rglob("*"), files / "etc" / "redbtc-proxy" / "config.toml"]:
        found = path.lstat()
        assert found.st_uid == found.st_gid == 0, path
        assert path.is_symlink() or not found.st_mode & 0o022, path
    assert (files / "data").stat().st_uid == 10001


def test_it_serves_the_demonstration_and_keeps_its_data(
    config: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    container = Container(config, files, tmp_path / "data")
    healthy = config["Healthcheck"]["Test"][1:]
    healthy[-1] = healthy[-1].replace("8080", str(container.port))
    with container.running():
        key = container.key()
        answer = container.chat(key)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] > 0
        assert httpx2.get(f"{container.url}/readyz", **USUAL).status_code == 200
        status = Path(f"/proc/{container.first.pid}/status").read_text()
        assert re.search(r"^Uid:(\t10001){4}$", status, re.M)
        assert re.search(r"^Gid:(\t10001){4}$", status, re.M)
        assert re.search(r"^CapEff:\t0+$", status, re.M)
        assert re.search(r"^NSpid:\t\d+\t1$", status, re.M), "it is the first process"
        mounts = Path(f"/proc/{container.first.pid}/mountinfo").read_text()
        assert re.search(r" / ro,", mounts)
        assert container.run(*healthy).returncode == 0
        shown = container.run("redbtc-proxy", "usage", "--json")
        assert len(json.loads(shown.stdout)["requests"]) == 1, shown.stderr
        assert container.terminate() == 0, container.log()
    assert container.run(*healthy).returncode != 0
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "data").iterdir()} == {0}
    with container.running():
        assert "sk-redbtc-" not in container.log(), "the key is shown once"
        assert container.chat(key).status_code == 200
        shown = container.run("redbtc-proxy", "usage", "--json")
        assert len(json.loads(shown.stdout)["requests"]) == 2
        assert container.terminate() == 0


def test_a_key_in_the_environment_is_used(
    config: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    container = Container(config, files, tmp_path / "data", OPENAI_API_KEY="sk-test")
    with container.running():
        assert "Forwarding to: openai (https://api.openai.com/v1)" in container.log()
        assert container.terminate() == 0


def test_other_commands_and_settings(config: dict[str, Any], files: Path, tmp_path: Path) -> None:
    """`docker run IMAGE init /data` makes settings in the volume, which REDBTC_CONFIG names."""
    container = Container(config, files, tmp_path / "data")
    made = container.run("redbtc-proxy", "init", "/data")
    assert made.returncode == 0, made.stderr
    assert "redbtc-proxy --config data/config.toml serve --first-run" in made.stdout
    container = Container(config, files, tmp_path / "data", REDBTC_CONFIG="/data/config.toml")
    with container.running():
        assert (tmp_path / "data" / "redbtc.db").exists()
        assert container.terminate() == 0
