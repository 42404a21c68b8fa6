"""What happens to upstreams is logged, recorded and told to the webhook, and survives a restart.

The changes come from a file: each line of it is one change, as a health check would make it."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from redbtc.store.schema import migrations, schema
from tests.dashboard.pages import cells
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.logins import new_user
from tests.helpers.upstream import Received, Reply, Upstream
from tests.helpers.webhook import SECRET, Hook, receiving

pytestmark = pytest.mark.promise_9

PRELUDE = """
import asyncio, json, pathlib, sys
sys.path.insert(0, {root!r})
from redbtc.gateway import upstream_journal, upstream_messages
from redbtc.upstream.change import UpstreamChange

upstream_messages.PAIR_SECONDS = {pair_seconds}
resume = upstream_journal.UpstreamJournal.resume

async def read(journal):
    file = pathlib.Path("changes")
    while True:
        await asyncio.sleep(0.005)
        if file.exists():
            text = file.read_text()
            file.unlink()
            for line in text.splitlines():
                journal.note(UpstreamChange(**json.loads(line)))

async def resume_and_read(self, members):
    rests = await resume(self, members)
    pathlib.Path("rests").write_text(json.dumps([each._asdict() for each in rests]))
    self.reading = asyncio.create_task(read(self))
    return rests

upstream_journal.UpstreamJournal.resume = resume_and_read
"""
MINUTES = 300.0


@pytest.fixture
def hook() -> Iterator[Hook]:
    with receiving() as hook:
        yield hook


BESIDE = '[[upstreams]]\nname = "beside"\nbase_url = "http://127.0.0.1:1/v1"\napi_key_env = ""'


def watched(
    make_gateway: MakeGateway, hook: Hook | None, pair_seconds: float = MINUTES, more: str = ""
) -> Gateway:
    """A gateway that reads changes from a file, and has a webhook if `hook` is given. `more` are
    further upstreams."""
    billing = '[billing]\nunpriced_models = "free"\n'
    gateway = make_gateway(billing + (hook.settings() if hook else ""), more, HOOK_SECRET=SECRET)
    gateway.prelude = PRELUDE.format(root=str(ROOT), pair_seconds=pair_seconds)
    return gateway.start()


def note(gateway: Gateway, *changes: dict[str, Any]) -> None:
    """Let changes happen, one after the other, and wait until the gateway knows of them."""
    file = gateway.folder / "changes"
    lines = "".join(f"{json.dumps(change)}\n" for change in changes)
    new = Path(f"{file}.new")
    new.write_text(lines)
    new.rename(file)
    wait_until(lambda: not file.exists())
    gateway.flushed_log()


def changed(state: str, was: str = "up", **given: Any) -> dict[str, Any]:
    usual = {"upstream": "test", "reason": "refused", "model": "", "seconds": None, "by": ""}
    return {**usual, "state": state, "was": was, **given}


OUT = changed("out", seconds=30.0)
BACK = changed("up", "out", reason="recovered")


def changes_of(gateway: Gateway, limit: int = 100) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.api("GET", "/upstreams/changes", limit=limit)["changes"]
    return found


def messages_of(gateway: Gateway) -> list[dict[str, Any]]:
    """The messages to the webhook, oldest first."""
    found: list[dict[str, Any]] = gateway.api("GET", "/webhook")["messages"]
    return found[::-1]


def logged(gateway: Gateway) -> list[dict[str, Any]]:
    """What the log says of changes, without the time."""
    lines = [json.loads(line) for line in gateway.flushed_log().splitlines() if line[:1] == "{"]
    return [
        {name: value for name, value in line.items() if name not in ("time", "event")}
        for line in lines
        if line["event"] == "upstream changed"
    ]


# ── The log and the list ─────────────────────────────────────────────────────────────────────────


def test_each_change_is_logged_once_and_listed(make_gateway: MakeGateway) -> None:
    gateway = watched(make_gateway, None)
    limited: dict[str, Any] = {"model": "gpt-5.5", "seconds": 20.0, "reason": "rate_limit_exceeded"}
    note(gateway, changed("resting", **limited))
    note(gateway, OUT, changed("out", upstream="b/KEY", reason="credentials"))
    note(gateway, changed("up", "out", reason="resumed by hand", by="ada@example.com"))
    assert logged(gateway) == [
        {"level": "info", "upstream": "test", "state": "resting", "was": "up", **limited},
        {
            "level": "warning",
            "upstream": "test",
            "state": "out",
            "was": "up",
            "reason": "refused",
            "seconds": 30.0,
        },
        {
            "level": "error",
            "upstream": "b/KEY",
            "state": "out",
            "was": "up",
            "reason": "credentials",
        },
        {
            "level": "info",
            "upstream": "test",
            "state": "up",
            "was": "out",
            "reason": "resumed by hand",
            "by": "ada@example.com",
        },
    ]
    wait_until(lambda: len(changes_of(gateway)) == 4)
    last, credentials, out, rest = changes_of(gateway)
    assert (last["changed_by"], last["was"], last["state"]) == ("ada@example.com", "out", "up")
    assert (credentials["upstream"], credentials["until"]) == ("b/KEY", None)
    assert (out["model"], out["changed_by"], out["reason"]) == (None, None, "refused")
    assert rest["model"] == "gpt-5.5"
    assert rest["changed_at"] < out["until"]
    assert rest["changed_at"] < rest["until"]
    assert changes_of(gateway, limit=1) == [last]
    gateway.restart()
    assert changes_of(gateway) == [last, credentials, out, rest]


def test_what_is_too_long_is_cut_and_a_rest_of_such_a_model_is_not_kept(
    make_gateway: MakeGateway,
) -> None:
    gateway = watched(make_gateway, None)
    note(gateway, changed("resting", model="m" * 5000, reason="r" * 5000, seconds=600.0))
    wait_until(lambda: changes_of(gateway))
    (shown,) = changes_of(gateway)
    assert (shown["model"], shown["reason"]) == ("m" * 256, "r" * 100)
    gateway.restart()
    assert json.loads((gateway.folder / "rests").read_text()) == []
    assert not Path(f"{gateway.database}.owed.refused").exists()


def empty_database() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.executescript("".join(script for _, script in sorted(migrations(schema()).items())))
    return database


def test_the_lists_are_bounded() -> None:
    database = empty_database()
    for number in range(1100):
        database.execute(
            "INSERT INTO upstream_changes (id, changed_at, upstream, was, state, reason)"
            " VALUES (?, ?, 'a', 'up', 'out', 'refused')",
            (f"upc_{number}", number),
        )
        model = "" if number == 0 else f"m{number}"
        database.execute(
            "INSERT INTO upstream_rests VALUES ('a', ?, 0, ?, '')", (model, number + 1)
        )
    one = "SELECT count(*), min(changed_at), max(changed_at) FROM upstream_changes"
    assert database.execute(one).fetchall() == [(1000, 100, 1099)]
    kept = "SELECT count(*), min(until), max(until) FROM upstream_rests WHERE model <> ''"
    assert database.execute(kept).fetchall() == [(999, 102, 1100)]
    assert database.execute("SELECT until FROM upstream_rests WHERE model = ''").fetchall() == [
        (1,)
    ]


def test_messages_are_kept_until_they_are_sent_or_given_up() -> None:
    database = empty_database()
    day = 86_400_000

    def add(number: int, created_at: int, delivered_at: int | None) -> None:
        database.execute(
            "INSERT INTO webhook_messages (id, type, data, created_at, delivered_at)"
            " VALUES (?, 'upstream.out', '{}', ?, ?)",
            (f"msg_{number}", created_at, delivered_at),
        )

    add(0, 0, None)  # given up when the others are added
    add(1, 2 * day, None)
    add(2, 2 * day, 2 * day)
    for number in range(3, 1103):
        add(number, 4 * day, 4 * day)
    kept = [name for (name,) in database.execute("SELECT id FROM webhook_messages ORDER BY number")]
    assert kept == ["msg_1", *(f"msg_{number}" for number in range(103, 1103))]


# ── The webhook ──────────────────────────────────────────────────────────────────────────────────


def test_an_outage_and_its_end_are_told_signed_and_listed(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook)
    hook.answer = hook.fails_first
    note(gateway, changed("resting", model="gpt-5.5", reason="rate_limit_exceeded", seconds=5.0))
    note(gateway, changed("up", "resting", model="gpt-5.5", reason="recovered"))
    note(gateway, OUT)
    wait_until(lambda: len(hook.accepted) == 1)
    note(gateway, changed("out", "out", seconds=60.0), BACK)
    wait_until(lambda: len(hook.accepted) == 2)
    told = [("upstream.out", "test"), ("upstream.back", "test")]
    assert [post.told for post in hook.accepted] == told, "not the rest of one model"
    assert len({post.id for post in hook.posts}) == 2
    assert len(hook.posts) == 4
    checker = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    for post in hook.posts:
        checker.webhooks.verify_signature(post.body, post.headers)
    out, back = (post.content["data"] for post in hook.accepted)
    assert set(out) == {"upstream", "state", "reason", "until", "text"}
    assert (out["state"], out["reason"]) == ("out", "refused")
    assert out["text"] == f"test was taken out until {out['until']} at the latest: refused."
    assert (back["state"], back["until"]) == ("up", None)
    assert back["text"] == "test serves again: recovered."
    wait_until(lambda: all(each["state"] == "delivered" for each in messages_of(gateway)))
    assert [each["id"] for each in messages_of(gateway)] == [post.id for post in hook.accepted]
    for each in messages_of(gateway):
        assert (each["tries"], each["status"], each["error"]) == (2, 204, None)
        assert each["created_at"] <= each["tried_at"] == each["delivered_at"]


@pytest.mark.parametrize(
    "given",
    [
        changed("resting", reason="insufficient_quota", seconds=600.0),
        changed("resting", reason="by hand", by="ada", seconds=600.0),
        changed("unusable", reason="no key"),
    ],
    ids=["quota", "by hand", "unusable"],
)
def test_whatever_keeps_a_member_from_serving_is_an_outage(
    make_gateway: MakeGateway, hook: Hook, given: dict[str, Any]
) -> None:
    gateway = watched(make_gateway, hook)
    note(gateway, given, changed("up", given["state"], reason="resumed by hand", by="ada"))
    wait_until(lambda: len(hook.accepted) == 2)
    assert [post.content["type"] for post in hook.accepted] == ["upstream.out", "upstream.back"]


def test_rests_for_single_models_neither_begin_nor_end_an_outage(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    """A member that rests for a model does so, too, when an outage of it is over."""
    gateway = watched(make_gateway, hook, pair_seconds=0.0)
    limit: dict[str, Any] = {"reason": "rate_limit_exceeded", "seconds": 600.0}
    quota: dict[str, Any] = {"reason": "insufficient_quota", "seconds": 600.0}
    note(gateway, changed("resting", model="a", **limit), changed("out", "resting", seconds=30.0))
    note(gateway, changed("out", "out", model="b", **limit))  # of a request that was in flight
    wait_until(lambda: len(hook.accepted) == 1)
    note(gateway, changed("resting", "out", reason="recovered"))
    wait_until(lambda: len(hook.accepted) == 2)
    note(gateway, changed("resting", "resting", **quota))
    note(gateway, changed("resting", "resting", model="c", **limit))
    note(gateway, changed("resting", "resting", model="a", reason="recovered"))
    wait_until(lambda: len(hook.accepted) == 3)
    note(gateway, changed("resting", "resting", reason="recovered"))
    wait_until(lambda: len(hook.accepted) == 4)
    told = [(post.told[0], post.content["data"]["reason"]) for post in hook.accepted]
    assert told == [
        ("upstream.out", "refused"),
        ("upstream.back", "recovered"),
        ("upstream.out", "insufficient_quota"),
        ("upstream.back", "recovered"),
    ]
    assert len(messages_of(gateway)) == 4
    assert [line["level"] for line in logged(gateway)].count("warning") == 3
    gateway.restart()
    assert [each["model"] for each in rests_of(gateway)] == ["b", "c"]


def test_rejected_credentials_are_told_once_until_the_member_serves(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook, pair_seconds=0.0)
    rejected = changed("out", reason="credentials")
    note(gateway, rejected, {**rejected, "was": "out"}, {**rejected, "was": "out"})
    note(gateway, BACK, changed("up", "up", reason="credentials"))  # the last usable member
    wait_until(lambda: len(hook.accepted) == 4)
    assert [post.content["type"] for post in hook.accepted] == [
        "upstream.credentials",
        "upstream.out",
        "upstream.back",
        "upstream.credentials",
    ]
    text = hook.accepted[0].content["data"]["text"]
    assert text == "test rejected the API key that the gateway uses for it."


def test_a_member_that_goes_up_and_down_does_not_flood_the_webhook(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook)
    note(gateway, *[OUT, BACK] * 50)
    note(gateway, changed("out", upstream="other"))  # another member is told of at once
    wait_until(lambda: len(hook.accepted) == 3)
    note(gateway, OUT)
    assert [post.told for post in hook.accepted] == [
        ("upstream.out", "test"),
        ("upstream.back", "test"),
        ("upstream.out", "other"),
    ]
    assert len(messages_of(gateway)) == 3
    assert len(logged(gateway)) == 102, "the log has them all"


def test_an_outage_that_lasts_is_told_of_later_and_one_that_is_over_is_not(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook, pair_seconds=1.0)
    note(gateway, OUT, BACK, OUT, changed("out", "out", reason="dns"))
    note(
        gateway,
        *[changed(state, was, upstream="b") for state, was in [("out", "up"), ("up", "out")] * 2],
    )
    wait_until(lambda: len(hook.accepted) >= 5)
    note(gateway, BACK)
    wait_until(lambda: len(hook.accepted) >= 6)
    of_test = [post.content for post in hook.accepted if post.told[1] == "test"]
    assert [each["type"] for each in of_test] == ["upstream.out", "upstream.back"] * 2
    assert [each["data"]["reason"] for each in of_test][2] == "dns", "as it is by then"
    of_b = [post.told[0] for post in hook.accepted if post.told[1] == "b"]
    assert of_b == ["upstream.out", "upstream.back"]


def test_a_message_does_not_overtake_one_that_was_not_accepted(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook)
    hook.answer = lambda _: 503
    note(gateway, OUT, BACK, changed("out", upstream="b"))
    wait_until(lambda: {post.told[1] for post in hook.posts} == {"test", "b"})
    hook.answer = lambda _: 204
    wait_until(lambda: len(hook.accepted) == 3)
    of_test = [post.told[0] for post in hook.posts if post.told[1] == "test"]
    assert of_test[-1] == "upstream.back"
    assert of_test.count("upstream.back") == 1


def test_without_a_webhook_nothing_waits(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, None)
    note(gateway, OUT, changed("out", upstream="b", reason="credentials"))
    found = gateway.api("GET", "/webhook")
    assert found == {"configured": False, "messages": []}
    gateway.configure(f'[billing]\nunpriced_models = "free"\n{hook.settings()}')
    gateway.signal(1)
    gateway.wait_for_log("reloaded")
    note(gateway, BACK)
    assert gateway.api("GET", "/webhook") == {"configured": True, "messages": []}
    note(gateway, OUT)
    wait_until(lambda: [post.told[0] for post in hook.accepted] == ["upstream.out"])


def test_an_upstream_that_is_removed_from_the_settings_is_told_of_as_back(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook)
    note(gateway, changed("out", upstream="gone"))
    gateway.signal(1)
    wait_until(lambda: len(hook.accepted) == 2)
    told = hook.accepted[1].content
    assert (told["type"], told["data"]["reason"]) == ("upstream.back", "removed")
    assert told["data"]["text"] == "gone was removed from the settings."


# ── A restart ────────────────────────────────────────────────────────────────────────────────────


def rests_of(gateway: Gateway) -> list[dict[str, Any]]:
    rests: list[dict[str, Any]] = json.loads((gateway.folder / "rests").read_text())
    return rests


def test_rests_that_are_still_in_the_future_survive_a_restart(make_gateway: MakeGateway) -> None:
    gateway = watched(make_gateway, None, more=BESIDE)
    limit: dict[str, Any] = {"reason": "rate_limit_exceeded", "seconds": 600.0}
    note(gateway, changed("resting", model="a", **limit), changed("resting", model="b", **limit))
    note(gateway, changed("resting", model="short", reason="busy", seconds=0.001))
    note(gateway, changed("up", "resting", model="b", reason="recovered"))
    note(gateway, changed("resting", model="a", reason="busy", seconds=300.0))
    note(gateway, changed("resting", "resting", reason="insufficient_quota", seconds=900.0))
    note(gateway, changed("resting", upstream="removed", **limit))
    note(gateway, OUT)  # an outage is found again by the first request
    note(gateway, changed("resting", model="over", reason="busy", seconds=0.001))
    gateway.kill()
    gateway.start()
    whole, of_model = rests_of(gateway)
    assert (whole["upstream"], whole["model"]) == ("test", "")
    assert whole["reason"] == "insufficient_quota"
    assert (of_model["model"], of_model["reason"]) == ("a", "busy")
    remaining = [rest["until"] / 1000 - time.time() for rest in (of_model, whole)]
    assert 0 < remaining[0] <= 300 < remaining[1] <= 900
    note(gateway, changed("up", "resting", reason="recovered"))
    gateway.restart()
    assert rests_of(gateway) == [of_model], "its limit is not over"
    note(gateway, changed("resting", reason="insufficient_quota", seconds=900.0))
    note(gateway, changed("up", "resting", reason="resumed by hand", by="ada"))
    gateway.restart()
    assert rests_of(gateway) == []


def test_an_outage_that_was_told_of_ends_with_a_restart_unless_it_goes_on(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook)
    note(gateway, OUT, changed("out", upstream="removed"))
    wait_until(lambda: len(hook.accepted) == 2)
    gateway.restart()
    wait_until(lambda: len(hook.accepted) == 4)
    told = {post.told: post.content["data"]["reason"] for post in hook.accepted[2:]}
    assert told == {("upstream.back", "test"): "restarted", ("upstream.back", "removed"): "removed"}
    note(gateway, OUT)
    assert len(messages_of(gateway)) == 4, "not so soon after the one before the restart"


def test_a_member_that_goes_on_resting_after_a_restart_is_not_told_of_as_back(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook, more=BESIDE)
    note(gateway, changed("resting", reason="insufficient_quota", seconds=900.0))
    wait_until(lambda: len(hook.accepted) == 1)
    gateway.restart()
    note(gateway, changed("resting", "resting", reason="insufficient_quota", seconds=900.0))
    assert len(messages_of(gateway)) == 1
    note(gateway, BACK)
    wait_until(lambda: len(hook.accepted) == 2)
    assert hook.accepted[1].told == ("upstream.back", "test")


def test_a_rest_that_was_not_told_of_yet_is_told_of_after_a_restart(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    """It began too soon after the last outage."""
    gateway = watched(make_gateway, hook, more=BESIDE)
    note(gateway, OUT, BACK)
    wait_until(lambda: len(hook.accepted) == 2)
    note(gateway, changed("resting", reason="by hand", seconds=9000.0, by="ada"))
    gateway.restart()
    wait_until(lambda: len(hook.accepted) == 3)
    assert hook.accepted[2].told == ("upstream.out", "test")
    data = hook.accepted[2].content["data"]
    assert (data["state"], data["reason"]) == ("resting", "by hand")
    gateway.restart()
    gateway.api("POST", "/upstreams/test/resume")
    wait_until(lambda: len(hook.accepted) == 4)
    assert hook.accepted[3].told == ("upstream.back", "test")


def test_messages_wait_for_a_receiver_across_a_restart(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook)
    hook.answer = lambda _: 500
    note(gateway, OUT)
    wait_until(lambda: hook.posts)
    wait_until(lambda: messages_of(gateway)[0]["tries"])
    (waiting,) = messages_of(gateway)
    assert (waiting["state"], waiting["status"]) == ("waiting", 500)
    hook.answer = lambda _: 204
    gateway.restart()
    wait_until(lambda: len(hook.accepted) == 2)
    assert [post.told[0] for post in hook.accepted] == ["upstream.out", "upstream.back"]
    assert hook.accepted[0].id == waiting["id"]


def test_notices_of_an_earlier_version_are_delivered_once(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    """Those that were delivered are in the list, and are not sent again."""
    gateway = make_gateway(
        f'[billing]\nunpriced_models = "free"\n{hook.settings()}', HOOK_SECRET=SECRET
    )
    now = int(time.time() * 1000)
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        sections = migrations(schema())
        for number in range(1, 13):
            database.executescript(sections[number])
        database.executescript(f"""
            PRAGMA application_id = {0x52424343};
            PRAGMA user_version = 12;
            INSERT INTO acting VALUES (1, 'test', 0);
            INSERT INTO accounts (id, name, created_at) VALUES ('acct_1', 'before', 0);
            DELETE FROM acting;""")
        for number, (created_at, delivered_at) in enumerate(
            [(now - 5000, now - 4000), (now - 3000, None), (now - 4 * 86_400_000, None)]
        ):
            values = (f"ntc_{number}", number, created_at, created_at, delivered_at)
            database.execute(
                "INSERT INTO notices (id, kind, account_id, month, percent, text, effective_at,"
                " created_at, delivered_at)"
                " VALUES (?, 'budget', 'acct_1', '2026-11', ?, 't', ?, ?, ?)",
                values,
            )
        database.commit()
    gateway.start()
    wait_until(lambda: hook.accepted)
    (post,) = hook.posts
    assert post.id == "ntc_1"
    assert post.content["type"] == "budget.reached"
    assert post.content["data"] == {
        "account": "before",
        "key_id": None,
        "month": "2026-11",
        "percent": 1,
        "text": "t",
    }
    wait_until(lambda: messages_of(gateway)[-1]["state"] == "delivered")
    assert {each["id"]: each["state"] for each in messages_of(gateway)} == {
        "ntc_2": "given_up",
        "ntc_0": "delivered",
        "ntc_1": "delivered",
    }
    delivered = {
        each["id"]: each["delivered_at"] for each in gateway.api("GET", "/notices")["notices"]
    }
    assert delivered["ntc_1"]
    assert delivered["ntc_0"]
    assert not delivered["ntc_2"]


# ── The commands ─────────────────────────────────────────────────────────────────────────────────


def test_the_commands_list_messages_and_send_a_test(make_gateway: MakeGateway, hook: Hook) -> None:
    gateway = watched(make_gateway, hook)
    note(gateway, OUT)
    wait_until(lambda: messages_of(gateway) and messages_of(gateway)[0]["delivered_at"])
    shown = gateway.run("webhook", "list").stdout
    assert "upstream.out" in shown
    assert "delivered" in shown
    assert "test was taken out" in shown
    note(gateway, BACK)
    wait_until(lambda: len(hook.accepted) == 2)
    (newest,) = gateway.cli("webhook", "list", "--limit", "1")["messages"]
    assert newest["type"] == "upstream.back"
    assert gateway.cli("webhook", "test") == {"delivered": True, "status": 204, "error": None}
    assert hook.posts[-1].content["type"] == "webhook.test"
    checker = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    checker.webhooks.verify_signature(hook.posts[-1].body, hook.posts[-1].headers)
    hook.answer = lambda _: 404
    failed = gateway.run("webhook", "test")
    assert (failed.returncode, failed.stdout) == (1, "The message was not accepted: status 404.\n")
    assert len(messages_of(gateway)) == 2, "a test is not in the list"


def test_the_body_of_a_webhooks_answer_is_not_waited_for(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The answer's status says it all. A body without an end would hold up all messages."""

    async def without_end(request: Received, reply: Reply) -> None:
        await reply.head(200)
        await reply.send(b"x")
        await reply.wait(request.closed)

    upstream.script = without_end
    billing = f'[billing]\nwebhook_url = "{upstream.url}"\nwebhook_secret_env = "HOOK_SECRET"\n'
    gateway = make_gateway(billing, HOOK_SECRET=SECRET).start()
    assert gateway.cli("webhook", "test") == {"delivered": True, "status": 200, "error": None}


def test_the_commands_say_that_there_is_no_webhook(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()  # which does not run
    listed = gateway.run("webhook", "list")
    assert listed.returncode == 0
    assert "nothing is sent" in listed.stdout
    tested = gateway.run("webhook", "test")
    assert tested.returncode == 1
    assert "billing.webhook_url" in tested.stderr


def test_the_pages_show_the_last_changes_and_what_was_sent(
    make_gateway: MakeGateway, hook: Hook
) -> None:
    gateway = watched(make_gateway, hook)
    operator = new_user(gateway, "op@example.com")
    with contextlib.closing(operator.client):
        assert "No changes yet." in operator.get("/dashboard/overview").text
        assert "No messages yet." in operator.get("/dashboard/webhook").text
        note(gateway, *[OUT, BACK] * 5)
        note(
            gateway, changed("resting", model="<b>gpt", seconds=60.0, reason="rate_limit_exceeded")
        )
        note(gateway, changed("up", "resting", model="<b>gpt", reason="resumed by hand", by="ada"))
        note(gateway, changed("resting", "resting", model="c", reason="recovered"))
        note(gateway, changed("up", "up", reason="credentials"))
        note(gateway, changed("unusable", upstream="b", reason="no key"))
        wait_until(lambda: len(changes_of(gateway)) == 15)
        wait_until(lambda: len(hook.accepted) == 4)
        wait_until(lambda: all(each["delivered_at"] for each in messages_of(gateway)))
        shown = cells(operator.get("/dashboard/overview").text, "The last 10 changes")
        assert len(shown) == 10
        told = [
            (name, re.sub(r"until \S+ \S+ UTC", "until T", what), by) for _, name, what, by in shown
        ]
        assert told[:7] == [
            ("b", "can&#39;t be used: no key", "gateway"),
            ("test", "kept in use: credentials", "gateway"),
            ("test", "no longer resting for c: recovered", "gateway"),
            ("test", "no longer resting for &lt;b&gt;gpt: resumed by hand", "ada"),
            ("test", "resting until T for &lt;b&gt;gpt: rate_limit_exceeded", "gateway"),
            ("test", "back: recovered", "gateway"),
            ("test", "taken out until T: refused", "gateway"),
        ]
        sent = cells(operator.get("/dashboard/webhook").text, "The last 4 messages")
        types = ["upstream.out", "upstream.credentials", "upstream.back", "upstream.out"]
        assert [line[1] for line in sent] == types
        assert [line[3:5] for line in sent] == [["delivered", "1"]] * 4
        assert [line[6] for line in sent] == ["status 204"] * 4
        form = {"do": "test", "test": "1"}
        assert (
            "accepted the test message: status 204"
            in operator.post("/dashboard/webhook", **form).text
        )
        hook.answer = lambda _: 500
        refused = operator.post("/dashboard/webhook", **form)
        assert "did not accept the test message: status 500" in refused.text


def test_no_secret_is_shown(make_gateway: MakeGateway, hook: Hook) -> None:
    """Neither the webhook's address, which may have a token, nor its secret or answer."""
    gateway = watched(make_gateway, hook)
    note(gateway, OUT)
    wait_until(lambda: hook.accepted)
    shown = gateway.run("webhook", "list", "--json").stdout + gateway.flushed_log()
    assert SECRET not in shown
    assert "/hook" not in shown
