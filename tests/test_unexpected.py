"""What Python and its libraries would print of unexpected errors is logged without its text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.canaries import new_canary, parts_in
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT

pytestmark = pytest.mark.promise_6

WAYS = {
    "thread": "t = threading.Thread(target=fail, name='t'); t.start(); t.join()",
    "end of an object": "Fails(); gc.collect()",
    "warning": "warnings.warn(CANARY, stacklevel=1)",
    "library": "logging.getLogger('lib').error('%s', CANARY)",
    "library's error": "try: fail()\nexcept ValueError: logging.getLogger('lib').exception(CANARY)",
    "task": "asyncio.run(forget())",
    "end": "fail()",
}
PROGRAM = """
import asyncio, gc, logging, sys, threading, warnings
sys.path.insert(0, sys.argv[1])
from redbtc.telemetry import LOG
from redbtc.unexpected import log_unexpected_errors
CANARY = sys.argv[2]
LOG.start()
log_unexpected_errors()

def fail():
    text = CANARY
    raise ValueError(text)

class Fails:
    def __del__(self):
        fail()

async def forget():
    async def work():
        fail()
    asyncio.create_task(work())
    await asyncio.sleep(0.01)
    gc.collect()

try:
    exec(sys.argv[3])
finally:
    LOG.flush()
"""


@pytest.mark.parametrize("way", WAYS)
def test_no_text_of_an_error_is_logged(way: str) -> None:
    command = [sys.executable, "-X", "dev", "-c", PROGRAM, str(ROOT), new_canary(), WAYS[way]]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == (way == "end"), done
    assert done.stdout == b""
    assert parts_in(done.stderr) == []
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    (line,) = lines
    if way == "warning":
        assert (line["event"], line["kind"]) == ("warning", "UserWarning")
    else:
        assert line["event"] == "unexpected error"
        raised = way != "library"
        assert line["error"] == ("ValueError" if raised else None)
        assert bool(line["places"]) == raised
