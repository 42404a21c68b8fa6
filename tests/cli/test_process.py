"""The process itself: its signals while it starts, its standard descriptors, its settings file, the
socket that commands use, and a database that it may not open."""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from redbtc.errors import UserError
from redbtc.telemetry import shown_error
from redbtc.times import parse_duration
from tests.helpers.gateway import PATIENCE_SECONDS, RUN, Gateway, MakeGateway, wait_until
from tests.helpers.tools import needs
from tests.helpers.upstream import Upstream

pytestmark = pytest.mark.promise_9

NOBODY = 65534  # a user who may not read what root made
RESPONSE = {"model": "m", "input": "Hi"}
INTERRUPTED = """
import os, signal, sys
def interrupt(event, arguments):
    if event == "open" and str(arguments[0]).endswith("config.toml"):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
"""


@pytest.fixture
def fork_server() -> None:
    """Let make_gateway start Python anew: these tests are about the start."""


def mask(gateway: Gateway, name: str) -> int:
    """One of the signal masks in /proc/PID/status; 0 once the process has ended."""
    for line in Path(f"/proc/{gateway.pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1], 16)
    return 0


def is_prepared(gateway: Gateway) -> bool:
    """Whether the first lines of redbtc_proxy.py have run."""
    return bool(mask(gateway, "SigBlk") & 1 << (signal.SIGHUP - 1))


def seconds_to_start(gateway: Gateway) -> float:
    """Start the gateway and end it; return how long it took to answer."""
    began = time.monotonic()
    gateway.start()
    took = time.monotonic() - began
    gateway.terminate()
    return took


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting_ends_it_silently(
    make_gateway: MakeGateway, number: signal.Signals
) -> None:
    """Until its own handlers are set the signal ends the process; then it drains, with status 0."""
    took = seconds_to_start(make_gateway())

    def end_while_starting(gateway: Gateway) -> int:
        gateway.start(wait=False)
        wait_until(lambda: is_prepared(gateway))
        time.sleep(random.uniform(0, took))
        gateway.signal(number)
        return gateway.wait()

    gateways = [make_gateway() for _ in range(15)]
    with ThreadPoolExecutor(2) as threads:
        statuses = set(threads.map(end_while_starting, gateways))
    assert statuses <= {0, -number}
    assert -number in statuses
    for gateway in gateways:
        lines = gateway.log().replace("\n", " ")
        assert "Traceback" not in lines
        assert "Error" not in lines
        assert "Aborted" not in lines


SLOW_TO_OPEN = """
import sqlite3, time
connect = sqlite3.connect
def slow(*arguments, **named):
    open("opening", "w").close()
    time.sleep(0.5)
    return connect(*arguments, **named)
sqlite3.connect = slow
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_database_is_opened_ends_it_silently(
    make_gateway: MakeGateway, number: signal.Signals
) -> None:
    gateway = make_gateway()
    gateway.prelude = SLOW_TO_OPEN
    gateway.start(wait=False)
    wait_until((gateway.folder / "opening").exists)
    gateway.signal(number)
    assert gateway.wait() in (0, -number)
    assert gateway.log() == ""


def test_a_reload_while_starting_comes_later(make_gateway: MakeGateway) -> None:
    took = seconds_to_start(make_gateway())
    for _ in range(5):
        gateway = make_gateway().start(wait=False)
        wait_until(functools.partial(is_prepared, gateway))
        time.sleep(random.uniform(0, took / 2))
        gateway.signal(signal.SIGHUP)
        gateway.wait_for_log('"reloaded"')
        gateway.terminate()


def test_ctrl_c_in_a_command_is_told_in_one_line(make_gateway: MakeGateway) -> None:
    """A command's prompt restores the terminal, so SIGINT is an exception there."""
    gateway = make_gateway()
    command = [sys.executable, "-c", INTERRUPTED + RUN, *gateway.command("check")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
    assert done.stderr.strip() == "Aborted!"


# The settings file


@pytest.mark.parametrize("text", ["", "# only\n# comments\n"])
def test_an_empty_settings_file_is_no_reload(gateway: Gateway, key: str, text: str) -> None:
    gateway.config.write_text(text)
    gateway.signal(signal.SIGHUP)
    wait_until(lambda: "reload refused" in gateway.log())
    assert "empty" in gateway.log()
    with gateway.client(key) as client:  # at the upstream of the settings that stay
        assert client.post("/responses", json=RESPONSE).status_code == 200


# The socket of commands


def remove(path: Path) -> None:
    path.unlink()


def replace_by_a_file(path: Path) -> None:
    path.unlink()
    path.write_text("not a socket")


def replace_by_a_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))


@pytest.mark.parametrize("spoil", [remove, replace_by_a_file, replace_by_a_socket])
def test_the_socket_of_commands_comes_back(gateway: Gateway, spoil: Callable[[Path], None]) -> None:
    path = Path(f"{gateway.database}.sock")
    for number in range(2):
        spoil(path)
        gateway.wait_for_log("socket made again", number + 1)
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        assert gateway.cli("account", "add", f"a{number}")["name"] == f"a{number}"
    assert gateway.terminate() == 0
    assert not path.exists()


def test_a_socket_that_cannot_be_made_is_said_once(gateway: Gateway) -> None:
    path = Path(f"{gateway.database}.sock")
    path.unlink()
    path.mkdir()
    wait_until(lambda: "commands can't connect" in gateway.log())
    time.sleep(1.2)  # two more tries
    assert gateway.log().count("commands can't connect") == 1
    path.rmdir()
    wait_until(lambda: "socket made again" in gateway.log())
    assert gateway.cli("account", "list") == {"accounts": []}


def test_a_socket_that_cannot_be_made_at_the_start_is_made_later(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway()
    path = Path(f"{gateway.database}.sock")
    path.mkdir()
    gateway.start()
    wait_until(lambda: "commands can't connect" in gateway.log())
    path.rmdir()
    wait_until(lambda: "socket made again" in gateway.log())
    assert gateway.cli("account", "list") == {"accounts": []}
    path.unlink()
    path.mkdir()
    assert gateway.terminate() == 0


def test_what_runs_on_the_lost_socket_goes_on(gateway: Gateway) -> None:
    path = Path(f"{gateway.database}.sock")
    with socket.socket(socket.AF_UNIX) as old:
        old.connect(str(path))
        path.unlink()
        wait_until(lambda: "socket made again" in gateway.log())
        old.sendall(b"GET /admin/v1/accounts HTTP/1.1\r\nhost: a\r\n\r\n")
        assert old.recv(1000).startswith(b"HTTP/1.1 200")


# Standard descriptors

WITHOUT_DESCRIPTORS = ("sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh")


def test_closed_standard_descriptors_are_opened_first(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    key = gateway.new_key()
    gateway.wrapper = WITHOUT_DESCRIPTORS
    gateway.start()
    opened = [os.readlink(f"/proc/{gateway.pid}/fd/{each}") for each in range(3)]
    with gateway.client(key) as client:
        for _ in range(5):
            assert client.post("/responses", json=RESPONSE).status_code == 200
    assert len(gateway.rows()) == 5
    assert gateway.terminate() == 0
    gateway.wrapper = ()
    assert gateway.cli("db", "check")["ok"]
    assert opened == ["/dev/null"] * 3


def test_a_command_without_descriptors_leaves_the_database_whole(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway()
    gateway.wrapper = WITHOUT_DESCRIPTORS
    assert gateway.run("account", "add", "a").returncode == 0
    gateway.wrapper = ()
    assert [each["name"] for each in gateway.cli("account", "list")["accounts"]] == ["a"]
    assert gateway.cli("db", "check")["ok"]


# A database that may not be opened


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a program as another user")
@pytest.mark.parametrize("spoiled", ["redbtc.db", "."])
@pytest.mark.process
def test_a_database_that_may_not_be_opened_is_one_clear_line(
    upstream: Upstream, spoiled: str
) -> None:
    """`.` is its folder. Each time it is said: the first try leaves nothing that changes it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        gateway = Gateway(folder / "data", upstream.url)
        gateway.config = folder / "config.toml"
        gateway.configure(f'[database]\npath = "{gateway.database}"\n')
        gateway.config.chmod(0o644)
        gateway.cli("account", "add", "a")
        for file in (gateway.folder, *gateway.folder.iterdir()):
            os.chown(file, NOBODY, NOBODY)
        (gateway.folder / spoiled).chmod(0)
        gateway.folder = folder
        gateway.wrapper = (needs("setpriv"), f"--reuid={NOBODY}", "--clear-groups")
        for command in (["serve"], ["account", "list"], ["check"], ["key", "add", "a"]) * 2:
            done = gateway.run(*command)
            wrong = done.stdout if command == ["check"] else done.stderr
            assert done.returncode == (2 if command == ["check"] else 1), done.stderr
            assert str(gateway.database) in wrong, (command, wrong)
            assert "Traceback" not in done.stderr
            assert command == ["check"] or len(done.stderr.splitlines()) == 1, done.stderr


# What is loaded when it is needed

LATER = (
    "redbtc.dashboard.app",
    "jinja2",
    "redbtc.dashboard.charts",
    "zxcvbn",
    "httpcore2",
    "h2",
    "redbtc.demo",
)
SAYS_WHAT_IS_LOADED = f"""
import atexit, sys
atexit.register(lambda: print("loaded", [name for name in {LATER!r} if name in sys.modules]))
"""


def test_a_start_loads_no_more_than_requests_need(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.prelude = SAYS_WHAT_IS_LOADED
    gateway.start()
    with gateway.client(gateway.new_key()) as client:
        assert client.post("/responses", json=RESPONSE).status_code == 200
    assert gateway.get("/status", headers={"accept": "application/json"}).status_code == 200
    assert gateway.terminate() == 0
    assert "loaded []" in gateway.log()


FAILS_ONCE = """
import builtins
usual, failed = builtins.__import__, []
def fail_once(name, *arguments, **named):
    if name == "redbtc.dashboard.app" and not failed:
        failed.append(name)
        raise MemoryError
    return usual(name, *arguments, **named)
builtins.__import__ = fail_once
"""


def test_pages_that_could_not_be_loaded_are_loaded_later(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.prelude = FAILS_ONCE
    gateway.start()
    assert gateway.get("/dashboard/login").status_code == 503
    assert gateway.get("/dashboard/login").status_code == 200


def test_the_log_says_in_which_folder_the_file_of_an_error_is() -> None:
    """Several files have the same name."""
    with pytest.raises(UserError) as raised:
        parse_duration("private")
    shown = shown_error(raised.value)
    assert shown["error"] == "UserError"
    assert shown["places"][-1].startswith("redbtc/times.py:")
    assert "private" not in str(shown)
