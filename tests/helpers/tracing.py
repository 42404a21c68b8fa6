"""A trace of the system calls with which a gateway can write anything, by strace."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.canaries import parts_in
from tests.helpers.gateway import Gateway, wait_until
from tests.helpers.tools import needs

# All that writes to a descriptor, opens or names a file, or shares memory with one; those that an
# architecture lacks are skipped ("?").
CALLS = [
    *("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range"),
    *("splice", "vmsplice", "tee", "io_submit", "io_uring_setup", "mmap", "memfd_create"),
    *("open", "openat", "openat2", "creat", "rename", "renameat", "renameat2", "link", "linkat"),
    *("symlink", "symlinkat", "mkdir", "mkdirat", "setxattr", "lsetxattr", "fsetxattr"),
    *("execve", "connect"),
]
MAX_SHOWN = 1 << 20  # bytes of what one call writes
TO_TCP = re.compile(rb"\w+\(\d+<TCP(?:v6)?:")
PATH = re.compile(rb'"((?:[^"\\]|\\.)*)"')
WRITABLE = re.compile(rb"\bO_(?:WRONLY|RDWR|CREAT)\b")
SHARED = re.compile(rb"mmap\([^<]*PROT_WRITE[^<]*MAP_SHARED[^<]*<([^>]*)>")
CUT = re.compile(rb'"\.\.\.')


class WriteTrace:
    """The trace of one gateway, from its start to its end."""

    def __init__(self, gateway: Gateway, path: Path) -> None:
        self._gateway = gateway
        self._path = path
        calls = ",".join(f"?{call}" for call in CALLS)
        # As the process that is started is the gateway itself (-D), it gets the signals.
        gateway.wrapper = (
            *(needs("strace"), "-D", "-f", "--seccomp-bpf", "-qq", "-yy"),
            *("-s", str(MAX_SHOWN), "-o", str(path), "-e", f"trace={calls}"),
        )

    def note_start(self) -> None:
        """Note which process traces the gateway, which has started."""
        status = Path(f"/proc/{self._gateway.pid}/status").read_text()
        (tracer,) = [line.split()[1] for line in status.splitlines() if line[:9] == "TracerPid"]
        assert tracer != "0", "it is traced"
        self._tracer = Path(f"/proc/{tracer}/status")
        self._gateway.wrapper = ()  # a command that is traced would overwrite the trace

    def _is_over(self) -> bool:
        try:
            return "\nState:\tZ" in self._tracer.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    def read(self) -> None:
        """Read the trace, once the gateway has ended."""
        self._gateway.wait()
        wait_until(self._is_over)
        lines = [line.partition(b" ")[2].lstrip() for line in self._path.read_bytes().splitlines()]
        self._lines = [line for line in lines if b"<... " not in line]

    @property
    def to_clients_and_upstreams(self) -> list[bytes]:
        """The calls that have written to TCP connections."""
        return [line for line in self._lines if TO_TCP.match(line)]

    @property
    def elsewhere(self) -> list[bytes]:
        """All other calls."""
        return [line for line in self._lines if not TO_TCP.match(line)]

    def leaks(self) -> list[bytes]:
        """Return the parts of canaries that were written to anything but a TCP connection."""
        elsewhere = self.elsewhere
        assert not [line[:200] for line in elsewhere if CUT.search(line)], "shown in full"
        return parts_in(b"\n".join(elsewhere))

    def opened_for_writing(self) -> set[str]:
        """Return the files that were opened for writing, or shared as memory that is written."""
        opened = {
            found[1].decode()
            for line in self.elsewhere
            if line.startswith((b"open", b"creat")) and WRITABLE.search(line)
            if (found := PATH.search(line))
        }
        return opened | {
            found[1].decode() for line in self.elsewhere if (found := SHARED.match(line))
        }

    def called(self, *names: str) -> list[bytes]:
        """Return the calls with these names."""
        starts = tuple(f"{name}(".encode() for name in names)
        return [line for line in self._lines if line.startswith(starts)]
