"""A session stays at one upstream, where its prompt is cached, as long as that one is there."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.pair import CHAT, RESPONSE, Pair
from tests.helpers.response_store import ResponseStore
from tests.helpers.upstream import Upstream, json_answer, openai_like

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_9]

# How a request names its session: what is named first decides.
NAMES: list[Callable[[str], dict[str, Any]]] = [
    lambda name: {"prompt_cache_key": name},
    lambda name: {"headers": {"session-id": name}},
    lambda name: {"headers": {"thread-id": name}},
    lambda name: {"headers": {"session_id": name}},
]
EQUAL: dict[str, Any] = {"weight": 1}
CONTENT = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo"}


def served_by(pair: Pair, path: str = "/chat/completions", **more: Any) -> str:
    """Return which upstream serves a request: "bad" or "good"."""
    before = len(pair.bad.requests), len(pair.good.requests)
    assert pair.ask(path, **more).status_code == 200
    after = len(pair.bad.requests), len(pair.good.requests)
    assert sum(after) == sum(before) + 1
    return "bad" if after[0] > before[0] else "good"


def session_of(pair: Pair, upstream: str, named: Callable[[str], dict[str, Any]]) -> str:
    """Return the name of a session whose first choice is this upstream."""
    for number in range(100):
        if served_by(pair, **named(f"{upstream} {number}")) == upstream:
            return f"{upstream} {number}"
    raise AssertionError("there is none")


def rest(upstream: Upstream, seconds: int) -> None:
    upstream.script = json_answer({"error": {}}, 429, {"retry-after": str(seconds)})


# ── One session, one upstream ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("path", ["/chat/completions", "/responses"])
def test_sessions_stay(pair: Pair, path: str, named: Callable[[str], dict[str, Any]]) -> None:
    pair.use(EQUAL)
    homes = [[served_by(pair, path, **named(f"s{n}")) for n in range(3)] for _ in range(12)]
    assert homes == [homes[0]] * 12
    others = {served_by(pair, path, **named(f"other {n}")) for n in range(40)}
    assert others == {"bad", "good"}


@pytest.mark.parametrize("first", range(4))
def test_what_names_the_session_first_decides(pair: Pair, first: int) -> None:
    pair.use(EQUAL)
    for at in range(first + 1, 4):
        home = session_of(pair, "bad", NAMES[first])
        away = session_of(pair, "good", NAMES[first])
        for one, other in ((home, away), (away, home)):
            more, further = NAMES[first](one), NAMES[at](other)
            headers = {**further.pop("headers"), **more.pop("headers", {})}
            assert served_by(pair, headers=headers, **more) == one.split()[0]


def test_sessions_are_an_accounts(pair: Pair) -> None:
    pair.use(EQUAL)
    names = [f"s{n}" for n in range(40)]
    homes = [served_by(pair, prompt_cache_key=name) for name in names]
    pair.key = pair.gateway.new_key(f"other{pair.number}")
    assert [served_by(pair, prompt_cache_key=name) for name in names] != homes


def test_an_empty_name_is_none(pair: Pair) -> None:
    pair.use(EQUAL)
    assert {served_by(pair, prompt_cache_key="") for _ in range(40)} == {"bad", "good"}


def test_after_a_restart_and_on_another_gateway(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path, fork_server: ForkServer
) -> None:
    names = ["one", "two", "three", "four"]
    tables = [{"name": name, "base_url": upstream.url, "api_key_env": ""} for name in names]
    settings = {"server": {}, "upstreams": tables}
    gateway = make_gateway(settings).start()
    key = gateway.new_key()

    def homes(gateway: Gateway) -> list[str]:
        with gateway.client(key) as client:
            for number in range(12):
                body = {**CHAT, "prompt_cache_key": f"s{number}"}
                assert client.post("/chat/completions", json=body).status_code == 200
        return [row["upstream"] for row in gateway.rows()[-12:]]

    before = homes(gateway)
    assert len({*before}) > 1
    assert homes(gateway.restart()) == before
    assert gateway.terminate() == 0
    other = make_gateway({**settings, "upstreams": tables[::-1]})
    shutil.copy(gateway.database, other.database)
    assert homes(other.start()) == before
    other.configure({**settings, "upstreams": tables[1:]})
    now = homes(other.restart())
    moved = [(then, new) for then, new in zip(before, now, strict=True) if then != new]
    assert {then for then, _ in moved} <= {"one"}, "only the sessions of the removed one move"


def test_without_a_session_by_weight(pair: Pair) -> None:
    pair.use({"weight": 1}, {"weight": 9})
    served = Counter(served_by(pair) for _ in range(150))
    assert 0 < served["bad"] < 60
    pair.use({"weight": 1}, {"weight": 1_000_000})
    assert {served_by(pair) for _ in range(10)} == {"good"}


def test_priority_comes_before_affinity(pair: Pair) -> None:
    pair.use({**EQUAL, "priority": 2})
    assert {served_by(pair, prompt_cache_key=f"s{n}") for n in range(20)} == {"good"}


# ── Away and back ────────────────────────────────────────────────────────────────────────────────


def test_sessions_move_while_their_upstream_rests(pair: Pair) -> None:
    pair.use(EQUAL)
    cached = NAMES[0]
    home, other = session_of(pair, "bad", cached), session_of(pair, "good", cached)
    rest(pair.bad, 3)
    assert pair.ask(**cached(home)).status_code == 200
    pair.bad.script = openai_like
    assert pair.gateway.rows(account=pair.account)[-1]["upstream"] == pair.name("good")
    assert served_by(pair, **cached(home)) == "good"
    assert served_by(pair, **cached(other)) == "good"
    wait_until(lambda: served_by(pair, **cached(home)) == "bad")
    assert served_by(pair, **cached(home)) == "bad"
    assert served_by(pair, **cached(other)) == "good"


@pytest.mark.parametrize("organization", ["", "acme"])
def test_encrypted_content_stays_where_it_can_be_read(pair: Pair, organization: str) -> None:
    """Of one organization, both upstreams can read it."""
    pair.use({**EQUAL, "organization": organization}, {"organization": organization})
    plain = {"prompt_cache_key": session_of(pair, "bad", NAMES[0])}
    replay = {**plain, "input": [CONTENT, {"role": "user", "content": "Hi"}]}
    assert served_by(pair, "/responses", **replay) == "bad"
    rest(pair.bad, 1)
    assert pair.ask("/responses", **plain).status_code == 200
    pair.bad.script = openai_like
    if not organization:
        assert served_by(pair, "/responses", **replay) == "good", "it was made there"
    wait_until(lambda: {served_by(pair) for _ in range(30)} == {"bad", "good"})
    for _ in range(3):
        assert served_by(pair, "/responses", **replay) == ("bad" if organization else "good")
    if not organization:
        rest(pair.good, 30)
        answer = pair.ask("/responses", **replay)
        assert answer.status_code == 200, "the alternative is an error anyway"
        assert pair.gateway.rows(account=pair.account)[-1]["upstream"] == pair.name("bad")
    assert served_by(pair, "/responses", **plain) == "bad"


def test_what_is_stored_stays(pair: Pair) -> None:
    pair.use(EQUAL)
    pair.bad.script = ResponseStore(first=1000 * pair.number)
    pair.good.script = ResponseStore(first=1000 * pair.number + 500)
    made = [pair.ask("/responses").json()["id"] for _ in range(6)]
    homes = [row["upstream"] for row in pair.gateway.rows(account=pair.account)]
    for response_id, home in zip(made, homes, strict=True):
        for _ in range(3):
            more = {"previous_response_id": response_id, "prompt_cache_key": "s"}
            assert pair.name(served_by(pair, "/responses", **more)) == home


def test_the_only_one_needs_no_session(pair: Pair) -> None:
    pair.alone()
    assert served_by(pair, "/responses", prompt_cache_key="s", input=[CONTENT]) == "bad"
    assert RESPONSE["model"] == pair.row["requested_model"]
