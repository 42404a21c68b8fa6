"""A gateway in which one chosen function, of all that a request passes through, raises an error
that quotes everything that the function was given."""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, Gateway, wait_until

ERRORS = ("ValueError", "MemoryError", "RecursionError", "OSError")
MARK = "raised-for-the-test"  # is in each error's message

# A thread is told what to do, and has the main thread call `prepare` in a signal's handler: a
# trace function belongs to the thread that sets it.
PRELUDE = f"""
import json as _json, os as _os, signal as _signal, socket as _socket, sys as _sys
import threading as _threading

PACKAGE = {str(ROOT / "redbtc")!r} + _os.sep
ERRORS = {{each.__name__: each for each in (ValueError, MemoryError, RecursionError, OSError)}}

class Raising:
    def __init__(self):
        self.seen, self.target, self.raised, self.error = {{}}, None, False, ValueError
        self.prepared = _threading.Event()
        _signal.signal(_signal.SIGUSR1, self.prepare)
        _threading.Thread(target=self.serve, daemon=True).start()

    def prepare(self, *_):
        _sys.settrace(self.trace)
        self.prepared.set()

    def trace(self, frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        name = code.co_filename[len(PACKAGE):] + ":" + code.co_qualname
        if self.target is None:
            self.seen[name] = None
        elif name == self.target and not self.raised:
            self.raised = True
            back = frame.f_back and frame.f_back.f_locals
            raise self.error({MARK!r} + repr(frame.f_locals) + repr(back))

    def serve(self):
        listener = _socket.socket(_socket.AF_UNIX)
        listener.bind("raising.sock")
        listener.listen()
        connection, _ = listener.accept()
        for line in connection.makefile("r"):
            target, error = _json.loads(line)
            was, seen = self.raised, list(self.seen)
            self.seen, self.target, self.raised = {{}}, target, False
            self.error = ERRORS[error]
            self.prepared.clear()
            _signal.pthread_kill(_threading.main_thread().ident, _signal.SIGUSR1)
            self.prepared.wait()
            connection.sendall(_json.dumps([was, seen]).encode() + b"\\n")

Raising()
"""


class RaisingGateway:
    """Tells a gateway with PRELUDE where to raise an error next. If the gateway has ended, it is
    started again."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        gateway.prelude = PRELUDE
        self._start()

    def _start(self) -> None:
        path = self.gateway.folder / "raising.sock"
        path.unlink(missing_ok=True)
        self.gateway.start()
        wait_until(path.exists)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_SECONDS)
        self._socket.connect(str(path))

    def close(self) -> None:
        """End the gateway."""
        self._socket.close()
        self.gateway.kill()

    def watch(self) -> None:
        """Note the functions that are called from now on."""
        self._tell(None, ERRORS[0])

    def raise_in(self, function: str, error: str = ERRORS[0]) -> tuple[bool, list[str]]:
        """Raise an error at the next call of a function. Return whether the one before was raised,
        and the functions that were noted."""
        try:
            raised, seen = self._tell(function, error)
        except (OSError, ValueError):
            self.gateway.wait()
            self._socket.close()
            self._start()
            self._tell(function, error)
            return True, []
        return raised, seen

    def _tell(self, *what: str | None) -> Any:
        self._socket.sendall(json.dumps(what).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += self._socket.recv(65536) or b"\n"
        return json.loads(answer)
