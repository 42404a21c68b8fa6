"""A machine of its own, with systemd as its first process.

It sees this machine's files, but what it writes or removes goes to memory and ends with it. It has
processes, cgroups, devices and a network of its own, and can't change the kernel's settings. That
matters: systemd's usual units set up a whole machine, and among other things empty /tmp. Therefore
it reads no units but those that it is given, and does not start before a file that this machine
has was removed there without being removed here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, wait_until
from tests.helpers.tools import needs

UNITS = "/etc/systemd/system"  # the only folder with units; empty at first
SYSTEMD = Path("/lib/systemd/systemd")
SERVICE_LOG = "/run/log"
UMASK = 0o022  # commands that tests run in their own process leave another one
LOG_CONF = f"[Service]\nStandardOutput=append:{SERVICE_LOG}\nStandardError=append:{SERVICE_LOG}\n"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TARGETS = ("sysinit", "basic", "sockets", "timers", "multi-user", "network-online", "shutdown")

# Runs as root in namespaces of its own. $FOLDER is an empty folder, $CANARY a file beside it.
BOOT = """
mount -t tmpfs -o mode=755 tmpfs "$FOLDER"
mkdir "$FOLDER/upper" "$FOLDER/work" "$FOLDER/root"
mount -t overlay -o "lowerdir=/,upperdir=$FOLDER/upper,workdir=$FOLDER/work" overlay "$FOLDER/root"
cd "$FOLDER/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/zero c 1 5
mknod -m 666 dev/full c 1 7
mknod -m 666 dev/random c 1 8
mknod -m 666 dev/urandom c 1 9
mknod -m 666 dev/tty c 5 0
ln -s /proc/self/fd dev/fd
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs dev/shm
rm "./$CANARY"
test -e "$CANARY"
mount -t tmpfs -o mode=755 tmpfs etc/systemd/system
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p opt/python opt/redbtc opt/packages
mount --bind "./$PYTHON" opt/python
mount --bind "./$CODE" opt/redbtc
mount --bind "./$PACKAGES" opt/packages
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir .old
pivot_root . .old
cd /
umount -l /.old
rmdir /.old
ip link set lo up
mkdir -p /run/ready
read -r go
exec setpriv --bounding-set=-sys_module,-sys_rawio,-sys_time,-sys_boot,-mknod,-syslog \\
    /lib/systemd/systemd --system --unit=default.target --log-target=console --show-status=no
"""

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
PROGRAM = f"""#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/opt/packages
exec /opt/python/bin/python{VERSION} /opt/redbtc/redbtc_proxy.py "$@"
"""


class Machine:
    """A machine that runs. `boot` makes one."""

    def __init__(self, pid: int) -> None:
        self._inside = ["nsenter", "-t", str(pid), "-p", "-m", "-C", "-n", "-u", "-i", "-r", "-w"]

    def run(
        self, *command: str, status: int | None = 0, given: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the machine's root. Fail if it ends with another status; None allows
        any."""
        done = subprocess.run(
            [*self._inside, *command],
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            env={"PATH": PATH, "SYSTEMD_UNIT_PATH": UNITS},
            umask=UMASK,
        )
        assert status in (None, done.returncode), (
            f"{command}: {done.stdout}{done.stderr}{self.failures()}{self.log()}"
        )
        return done

    def write(self, path: str, text: str, mode: str = "644") -> None:
        """Write a file of the machine, and make its folder."""
        self.run("mkdir", "-p", str(Path(path).parent))
        self.run("sh", "-c", 'cat > "$0" && chmod "$1" "$0"', path, mode, given=text)

    def systemctl(self, *arguments: str, status: int | None = 0) -> str:
        return self.run("systemctl", "--no-pager", *arguments, status=status).stdout

    def shown(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.systemctl("show", unit, "-P", name).strip()

    def wait_until_shown(self, unit: str, name: str, value: str) -> None:
        wait_until(
            lambda: self.shown(unit, name) == value,
            why=lambda: f"for {value}: {self.systemctl('status', unit, status=None)}{self.log()}",
        )

    def failures(self) -> str:
        """Return what systemd says of the services, such as why one could not be started."""
        return self.run("systemctl", "--no-pager", "status", "*.service", status=None).stdout

    def log(self) -> str:
        """Return what all services have written."""
        return self.run("cat", SERVICE_LOG, status=None).stdout


def cgroup_of_tests() -> Path:
    """Return the folder of this process's cgroup."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    root = next((each[4] for each in mounts if each[each.index("-") + 1] == "cgroup2"), None)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    assert root is not None, "no cgroup2 is mounted"
    assert own is not None, "the kernel has no cgroup2"
    return Path(root + own)


def remove_cgroup(folder: Path) -> None:
    for inner in sorted(folder.rglob("*"), reverse=True):
        if inner.is_dir():
            inner.rmdir()
    folder.rmdir()


@contextmanager
def boot(folder: Path, units: Mapping[str, str]) -> Iterator[Machine]:
    """Start a machine with these units, by file name, beside empty targets. Its package
    redbtc-proxy is the code of this repository."""
    tools = ("unshare", "nsenter", "setpriv", "ip", "mount", "pivot_root", str(SYSTEMD))
    for tool in tools:
        needs(tool)
    if os.getuid():
        pytest.skip("only root can start systemd")
    root, canary, log = folder / "machine", folder / "canary", folder / "log"
    root.mkdir()
    canary.touch()
    cgroup = cgroup_of_tests() / f"redbtc-test-{os.getpid()}-{id(folder)}"
    cgroup.mkdir()
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    places = {
        "FOLDER": str(root),
        "CANARY": str(canary),
        "PYTHON": sys.base_prefix,
        "CODE": str(ROOT),
        "PACKAGES": packages,
        "PATH": PATH,
        "container": "test",  # tells systemd that the machine is not its own
        "SYSTEMD_UNIT_PATH": UNITS,
        "SYSTEMD_GENERATOR_PATH": "/nonexistent",
    }
    new = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net", "--propagation", "private"]
    command = ["unshare", *new, "--fork", "--kill-child", "sh", "-euc", BOOT]
    enter = f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"'
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *command],
            env=places,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            umask=UMASK,
        )
    try:
        yield started(process, log, canary, units)
    finally:
        process.kill()
        process.communicate()
        wait_until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text())
        remove_cgroup(cgroup)


def started(
    process: subprocess.Popen[bytes], log: Path, canary: Path, units: Mapping[str, str]
) -> Machine:
    """Let systemd start once the machine is ready for it, and wait until it has."""

    def first() -> int | None:
        assert process.poll() is None, f"the machine ended: {log.read_text()}"
        return next((each.pid for each in psutil.Process(process.pid).children()), None)

    wait_until(first)
    pid = first()
    assert pid is not None
    machine = Machine(pid)
    ready = Path("/proc", str(pid), "root", "run", "ready")  # as the machine sees /run/ready
    wait_until(lambda: first() and ready.is_dir(), why=lambda: log.read_text())
    assert canary.exists(), "the machine can remove files of this machine"
    for target in (*TARGETS, "default"):
        name = f"{UNITS}/{target}.target"
        machine.write(name, f"[Unit]\nDescription={target}\nDefaultDependencies=no\n")
    for name, text in (*units.items(), ("service.d/log.conf", LOG_CONF)):
        machine.write(f"{UNITS}/{name}", text)
    machine.write("/usr/local/bin/redbtc-proxy", PROGRAM, "755")
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    wait_until(
        lambda: machine.run("systemctl", "is-system-running", status=None).stdout == "running\n",
        why=machine.log,
    )
    return machine
