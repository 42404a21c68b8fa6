"""The units of deploy/, under a real systemd."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from redbtc.store.schema import TRIGGERS, newest_version
from tests.helpers.gateway import ROOT, wait_until
from tests.helpers.machine import PROGRAM, VERSION, Machine, boot
from tests.helpers.programs import ADDED, add_section, copy_of_program
from tests.helpers.tools import needs
from tests.product.test_docs import DOCS, blocks

pytestmark = pytest.mark.promise_9

URL = "http://127.0.0.1:8080"
DEPLOY = ROOT / "deploy"
UNITS = ("redbtc-proxy.service", "redbtc-proxy.socket")
BACKUPS = ("redbtc-proxy-backup.service", "redbtc-proxy-backup.timer")
# What systemd before 253 says of the lines that are for newer ones.
EXPECTED = re.compile(
    r".*: Failed to parse service type, ignoring: notify-reload"
    r"|.*: Unknown key 'ReloadSignal' in section \[Service\], ignoring\."
)
SERVICE, SOCKET = UNITS
BACKUP = BACKUPS[0]
DEMO = """
[Service]
ExecStart=
ExecStart=/usr/local/bin/redbtc-proxy --config /etc/redbtc-proxy/config.toml serve --demo
"""


@pytest.mark.parametrize("name", ["redbtc-proxy.service", "redbtc-proxy-backup.service"])
def test_the_exposure_is_low(name: str) -> None:
    command = [needs("systemd-analyze"), "security", "--offline=true", "--threshold=20"]
    done = subprocess.run(
        [*command, "--no-pager", str(DEPLOY / name)], capture_output=True, text=True
    )
    assert "Overall exposure level" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    commands = printed("sysusers")
    with boot(tmp_path_factory.mktemp("machine"), {f"{SERVICE}.d/demo.conf": DEMO}) as running:
        running.run("sh", "-euc", f"cd /opt/redbtc\n{commands}")
        yield running


def curl(machine: Machine, url: str, *options: str) -> str:
    done = machine.run("curl", "-sS", "-m", "100", *options, url, status=None)
    return done.stdout or done.stderr


def command(machine: Machine, *arguments: str, user: str = "redbtc-proxy") -> str:
    """Run a command of the gateway as a user of the machine; return what it prints."""
    program = ["redbtc-proxy", "--config", "/etc/redbtc-proxy/config.toml"]
    return machine.run("runuser", "-u", user, "--", *program, *arguments).stdout


def started(machine: Machine, unit: str = SERVICE) -> str:
    """Start the gateway, unless it runs; return the id of its main process."""
    machine.systemctl("start", unit)
    return machine.shown(SERVICE, "MainPID")


@pytest.fixture
def key(machine: Machine) -> str:
    """A key of an account of its own."""
    started(machine)
    name = f"account-{time.monotonic_ns()}"
    command(machine, "account", "add", name)
    return str(json.loads(command(machine, "key", "add", name, "--json"))["key"])


def test_it_serves_with_all_that_is_forbidden(machine: Machine, key: str) -> None:
    """A request, a stream, a page, the metrics: what needs files, threads, sockets or /proc."""
    machine.wait_until_shown(SERVICE, "StatusText", "Serving; requests in flight: 0")
    headers = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    for more in ("", ', "stream": true'):
        body = f'{{"model": "redbtc-demo", "input": "hello"{more}}}'
        said = curl(machine, f"{URL}/v1/responses", *headers, "-d", body)
        assert '"completed"' in said or "response.completed" in said, said
    rows = json.loads(command(machine, "usage", "--json"))["requests"]
    assert [row["outcome"] for row in rows[:2]] == ["completed", "completed"]
    page = curl(machine, f"{URL}/dashboard/login", "-L")
    assert "password" in page
    metrics = curl(machine, f"{URL}/metrics")
    assert "process_open_fds" in metrics
    assert "redbtc_ledger_healthy 1.0" in metrics
    assert "sk-your-key" not in machine.log()


def test_only_its_user_and_root_get_at_its_files(machine: Machine, key: str) -> None:
    found = machine.run(
        "find", "/var/lib/redbtc-proxy", "-printf", "%m %u %f\\n"
    ).stdout.splitlines()
    assert "700 redbtc-proxy redbtc-proxy" in found
    assert {"600 redbtc-proxy redbtc.db", "600 redbtc-proxy redbtc.db.sock"} <= {*found}
    assert all(line.split()[0] in ("600", "700") for line in found), found
    assert "account-" in command(machine, "account", "list", user="root")
    program = ["redbtc-proxy", "--config", "/etc/redbtc-proxy/config.toml", "account", "list"]
    done = machine.run("runuser", "-u", "nobody", "--", *program, status=None)
    assert done.returncode == 1
    assert "account-" not in done.stdout


def test_it_is_started_again(machine: Machine) -> None:
    first = started(machine)
    machine.systemctl("restart", SERVICE)
    second = machine.shown(SERVICE, "MainPID")
    assert first != second
    machine.run("kill", "-9", second)
    wait_until(lambda: machine.shown(SERVICE, "MainPID") not in (second, "0"))
    machine.wait_until_shown(SERVICE, "ActiveState", "active")
    assert curl(machine, f"{URL}/healthz") == '{"status":"ok"}'
    machine.systemctl("stop", SERVICE)
    assert machine.shown(SERVICE, "ActiveState") == "inactive"
    assert machine.shown(SERVICE, "Result") == "success"


def new_main_process(machine: Machine, before: str) -> str:
    """Wait until the gateway has another main process; return its id."""
    wait_until(lambda: machine.shown(SERVICE, "MainPID") not in (before, "0"))
    return machine.shown(SERVICE, "MainPID")


def test_a_reload_changes_the_main_process(machine: Machine, key: str) -> None:
    """Debian 12 has no Type=notify-reload: there the signal is sent by hand."""
    before = started(machine)
    for _ in range(2):
        machine.systemctl("kill", "--kill-whom=main", "--signal=SIGUSR2", SERVICE)
        before = new_main_process(machine, before)
        machine.wait_until_shown(SERVICE, "SubState", "running")
        headers = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
        body = '{"model": "redbtc-demo", "input": "hello"}'
        assert '"completed"' in curl(machine, f"{URL}/v1/responses", *headers, "-d", body)
    assert json.loads(command(machine, "reload", "--json"))["restarts"] is False
    machine.systemctl("stop", SERVICE)
    assert machine.shown(SERVICE, "Result") == "success"
    assert '"stopping"' in machine.log()


def shown(machine: Machine) -> tuple[str, str]:
    """Return what systemd and the gateway say of the service."""
    return machine.systemctl("status", SERVICE, status=None), machine.log()


SLOW_MIGRATION = """
CREATE TABLE later AS WITH RECURSIVE numbers (number) AS (
    SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < 10000000)
    SELECT max(number) AS number FROM numbers;
"""
SLOW_UNIT = """
[Service]
ExecStart=
ExecStart=/usr/local/bin/redbtc-next --config /etc/redbtc-proxy/config.toml serve --demo
WatchdogSec=2
"""


@pytest.mark.slow
def test_a_reload_that_migrates_the_ledger_stays_the_same_service(tmp_path: Path) -> None:
    """Also if that takes longer than the watchdog waits. A machine of its own: its ledger is of a
    newer version."""
    commands = printed("sysusers")
    (tmp_path / "machine").mkdir()
    later = copy_of_program(tmp_path / "next")
    add_section(later, SLOW_MIGRATION)
    with boot(tmp_path / "machine", {f"{SERVICE}.d/next.conf": SLOW_UNIT}) as machine:
        machine.write(
            "/usr/local/bin/redbtc-next", PROGRAM.replace("/opt/redbtc", "/opt/next"), "755"
        )
        machine.run("mkdir", "/opt/next")
        machine.run("sh", "-euc", "cp -r /opt/redbtc/redbtc /opt/redbtc/*.* /opt/next")
        machine.run("sh", "-euc", f"cd /opt/redbtc\n{commands}")
        before = started(machine)
        machine.wait_until_shown(SERVICE, "SubState", "running")
        machine.write("/opt/next/schema.sql", (later / "schema.sql").read_text())
        machine.systemctl("kill", "--kill-whom=main", "--signal=SIGUSR2", SERVICE)
        new_main_process(machine, before)
        wait_until(lambda: '"migrated"' in machine.log(), why=lambda: str(shown(machine)))
        machine.wait_until_shown(SERVICE, "SubState", "running")
        machine.wait_until_shown(SERVICE, "StatusText", "Serving; requests in flight: 0")
        assert machine.shown(SERVICE, "NRestarts") == "0"
        machine.systemctl("stop", SERVICE)
        assert machine.shown(SERVICE, "Result") == "success"


@contextmanager
def changed_unit(machine: Machine, lines: str) -> Iterator[str]:
    """Run the gateway with other lines in its unit; yield the id of its main process."""
    drop_in = f"/etc/systemd/system/{SERVICE}.d/z.conf"
    machine.write(drop_in, f"[Service]\n{lines}\n")
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", SERVICE)
    try:
        wait_until(lambda: curl(machine, f"{URL}/healthz") == '{"status":"ok"}')
        yield machine.shown(SERVICE, "MainPID")
    finally:
        machine.run("rm", drop_in)
        machine.systemctl("daemon-reload")
        machine.systemctl("restart", SERVICE)


RELOAD = ("redbtc-proxy", "--config", "/etc/redbtc-proxy/config.toml", "reload")


def test_a_unit_that_is_told_nothing_is_not_reloaded(machine: Machine, key: str) -> None:
    """With Type=simple, systemd would end the service with the old process."""
    with changed_unit(machine, "Type=simple\nNotifyAccess=none\nWatchdogSec=0") as before:
        done = machine.run(*RELOAD, status=1)
        assert "set Type=notify in its unit" in done.stderr
        assert machine.shown(SERVICE, "MainPID") == before
        assert curl(machine, f"{URL}/v1/models", "-H", f"Authorization: Bearer {key}", "-f")


def test_a_unit_that_believes_only_the_main_process_is_reloaded(machine: Machine, key: str) -> None:
    with changed_unit(machine, "Type=notify\nNotifyAccess=main") as before:
        for _ in range(2):
            machine.run(*RELOAD)
            before = new_main_process(machine, before)
            assert curl(machine, f"{URL}/v1/models", "-H", f"Authorization: Bearer {key}", "-f")
        time.sleep(1)  # systemd ends a service whose main process has ended
        assert machine.shown(SERVICE, "ActiveState") == "active"


NEXT = f"""
Environment=LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/packages PYTHONDONTWRITEBYTECODE=1
ExecStart=
ExecStart=/opt/python/bin/python{VERSION} /opt/current/redbtc_proxy.py \\
    --config /etc/redbtc-proxy/next.toml serve --demo
"""
MAKE_NEXT = f"""
mkdir /opt/next
cp -r /opt/redbtc/redbtc /opt/redbtc/*.py /opt/redbtc/*.toml /opt/redbtc/deploy /opt/next
sed '/^{TRIGGERS.strip()}/i -- version {newest_version() + 1}\\n\\n{ADDED}\\n' \\
    /opt/redbtc/schema.sql > /opt/next/schema.sql
ln -s redbtc /opt/current
sed 's/redbtc.db/next.db/' /etc/redbtc-proxy/config.toml > /etc/redbtc-proxy/next.toml
"""


def test_a_version_that_migrates_takes_over(machine: Machine) -> None:
    """The old process ends before the new one can serve; systemd must not end the service then."""
    machine.run("sh", "-euc", MAKE_NEXT)
    with changed_unit(machine, NEXT) as before:
        machine.run("ln", "-sfn", "next", "/opt/current")
        program = [*RELOAD[:2], "/etc/redbtc-proxy/next.toml", "reload", "--json"]
        assert json.loads(machine.run(*program).stdout)["restarts"]
        before = new_main_process(machine, before)
        wait_until(lambda: curl(machine, f"{URL}/healthz") == '{"status":"ok"}')
        machine.wait_until_shown(SERVICE, "StatusText", "Serving; requests in flight: 0")
        assert machine.shown(SERVICE, "MainPID") == before
        assert machine.shown(SERVICE, "NRestarts") == "0"
        assert '"migrated"' in machine.log()


def test_a_stop_after_a_reload_waits_for_the_new_process(machine: Machine) -> None:
    """systemd kills at once a main process that is not its child when it hears of it."""
    started(machine)
    for _ in range(5):
        machine.systemctl("start", SERVICE)
        machine.run(*RELOAD)
        machine.systemctl("stop", SERVICE)
        assert machine.shown(SERVICE, "Result") == "success"


def test_the_watchdog_ends_what_stands_still(machine: Machine) -> None:
    machine.write(f"/etc/systemd/system/{SERVICE}.d/watchdog.conf", "[Service]\nWatchdogSec=3\n")
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", SERVICE)
    first = machine.shown(SERVICE, "MainPID")
    time.sleep(5)  # longer than it could be silent
    assert machine.shown(SERVICE, "MainPID") == first
    before = int(machine.shown(SERVICE, "NRestarts"))
    machine.run("kill", "-STOP", first)
    machine.wait_until_shown(SERVICE, "NRestarts", str(before + 1))
    machine.wait_until_shown(SERVICE, "ActiveState", "active")
    assert machine.shown(SERVICE, "MainPID") != first


def test_the_port_stays_open_while_the_gateway_does_not_run(machine: Machine) -> None:
    machine.systemctl("stop", SOCKET, SERVICE)
    assert "Failed to connect" in curl(machine, f"{URL}/healthz")
    machine.systemctl("start", SOCKET)
    assert machine.shown(SERVICE, "ActiveState") == "inactive"
    assert curl(machine, f"{URL}/healthz") == '{"status":"ok"}', "the connection starts it"
    assert curl(machine, "http://[::1]:8080/healthz") == '{"status":"ok"}'
    ask = "curl -sS -o /dev/null -m 100 http://127.0.0.1:8080/healthz; test $? != 7 || exit 7"
    loop = f"while ! test -e /run/enough; do {ask}; done"  # 7: the connection was refused
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(machine.run, "sh", "-c", loop, status=None)
        for _ in range(3):
            machine.systemctl("restart", SERVICE)
        machine.write("/run/enough", "")
        assert asking.result().returncode == 0
    machine.systemctl("stop", SOCKET, SERVICE)


def test_a_backup_is_made_every_day(machine: Machine, key: str) -> None:
    machine.systemctl("start", BACKUPS[1])
    listed = machine.systemctl("list-timers", BACKUPS[1], "-o", "short")
    assert BACKUP in listed
    assert machine.shown(BACKUPS[1], "Persistent") == "yes"
    machine.systemctl("start", BACKUP)  # as the timer does
    assert machine.shown(BACKUP, "Result") == "success"
    folder = "/var/lib/redbtc-proxy-backups"
    made = machine.run("find", folder, "-type", "f", "-printf", "%m %u %f\\n").stdout.splitlines()
    assert len(made) == 2
    for line in made:
        assert re.fullmatch(r"600 redbtc-proxy redbtc-\d{8}T\d{6}Z\.db(\.sha256)?", line)


def printed(*texts: str) -> str:
    """Return the block of commands of docs/operating.md that has these texts."""
    found = blocks(DOCS / "operating.md", "sh")
    (code,) = [code for code in found if all(text in code for text in texts)]
    return code


def test_a_restore_is_drilled_as_printed(machine: Machine, key: str) -> None:
    folder = "/var/lib/redbtc-proxy-backups"
    account = json.loads(command(machine, "account", "list", "--json"))["accounts"][-1]["name"]
    command(machine, "account", "log", account, "--days", "3")
    headers = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    body = '{"model": "redbtc-demo", "input": "hello"}'
    assert '"completed"' in curl(machine, f"{URL}/v1/responses", *headers, "-d", body)
    (row,) = json.loads(command(machine, "usage", "--account", account, "--json"))["requests"]
    wait_until(lambda: "redbtc_request_log_requests_total 1.0" in curl(machine, f"{URL}/metrics"))
    machine.run("install", "-d", "-o", "redbtc-proxy", "-g", "redbtc-proxy", "-m", "700", folder)
    command(machine, "db", "backup", folder, "--keep", "3", "--with-request-log")
    before = machine.shown(SERVICE, "MainPID")
    said = machine.run("sh", "-euc", printed("drill=$(mktemp")).stdout
    assert said.count("The database is intact.") == 2
    assert account in said
    assert row["started_at"] in said
    assert machine.shown(SERVICE, "MainPID") == before
    left = machine.run("ls", folder).stdout.split()
    assert all(re.fullmatch(r"redbtc-\d{8}T\d{6}Z\.db[a-z0-9_.]*", name) for name in left), left
    assert any(name.endswith(".request_log.db") for name in left)


def test_a_backup_is_restored_as_printed(machine: Machine, key: str) -> None:
    accounts = json.loads(command(machine, "account", "list", "--json"))["accounts"]
    machine.systemctl("start", BACKUP)
    command(machine, "account", "add", "later")
    machine.run("sh", "-euc", printed("systemctl stop", "$backup"))
    assert machine.shown(SERVICE, "ActiveState") == "active"
    restored = json.loads(command(machine, "account", "list", "--json"))["accounts"]
    assert [each["name"] for each in restored] == [each["name"] for each in accounts]
    assert curl(machine, f"{URL}/v1/models", "-H", f"Authorization: Bearer {key}", "-f")
    owners = machine.run("find", "/var/lib/redbtc-proxy", "!", "-user", "redbtc-proxy").stdout
    assert owners == "", "the gateway owns all of its files"
