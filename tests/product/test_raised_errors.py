"""An unexpected error, anywhere on the way of a request, quotes the request and everything around
it in its message: no byte of that gets out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.canaries import files_with_parts, parts_in
from tests.helpers.content import Quoting, Ways, settings
from tests.helpers.gateway import Gateway
from tests.helpers.raising import ERRORS, MARK, RaisingGateway
from tests.helpers.upstream import Upstream

pytestmark = [pytest.mark.promise_6, pytest.mark.slow]

# Each function is made to raise once, those in OFTEN once in each way.
WAYS = (
    *(Ways.json, Ways.chat, Ways.form, Ways.turn, Ways.failover, Ways.stream, Ways.packed),
    *(Ways.stored, Ways.background, Ways.recording, Ways.dashboard),
)
OFTEN = ("gateway/metered", "gateway/relay", "gateway/answer", "gateway/admitted", "meter/")
FIRST = "server/protocol.py:HTTPProtocol.data_received"  # no content has come before that
# An error in one of these ends the process, which the last of them stands for.
OF_LEDGER = ("store/commits.py:", "store/entries.py:", "store/request_rows.py:")
ENDS_PROCESS = "store/commits.py:Commits._write_group"
SECONDS = 0.5  # for an answer: where the step that answers fails, there is none


@pytest.fixture
def raising(tmp_path: Path, upstream: Upstream) -> Iterator[RaisingGateway]:
    gateway = Gateway(tmp_path / "gateway", upstream.url, settings(upstream), TMPDIR=str(tmp_path))
    running = RaisingGateway(gateway)
    yield running
    running.close()


def functions_of(raising: RaisingGateway, ways: Ways, way: Callable[[Ways], bytes]) -> list[str]:
    """Return the functions that requests of a way pass through, from their first byte on."""
    while not parts_in(way(ways)):  # the gateway may be ending after the error before
        raising.raise_in("nothing")
    raising.watch()
    assert parts_in(way(ways))
    seen = raising.raise_in("nothing")[1]
    seen = seen[seen.index(FIRST) :] if FIRST in seen else seen
    return [each for each in seen if each == ENDS_PROCESS or not each.startswith(OF_LEDGER)]


def test_no_error_quotes_a_request(
    raising: RaisingGateway, upstream: Upstream, tmp_path: Path
) -> None:
    Quoting(upstream)
    gateway, errors = raising.gateway, itertools.cycle(ERRORS)
    done: set[str] = set()
    raised = 0
    with Ways(gateway, gateway.new_key(), SECONDS) as ways:
        for way in WAYS:
            for function in functions_of(raising, ways, way):
                if function in done and not function.startswith(OFTEN):
                    continue
                done.add(function)
                raised += raising.raise_in(function, next(errors))[0]
                assert MARK not in way(ways).decode(), (way, function)
    assert raised > 500
    gateway.kill()
    events = [
        json.loads(line).get("event") for line in gateway.log().splitlines() if line[:1] == "{"
    ]
    assert {"request", "unexpected error", "task ended"} <= {*events}
    assert MARK not in gateway.log()
    assert files_with_parts(tmp_path) == {}
