"""The dashboard's forms and pages: roles, separation of accounts, figures, keys and limits."""

from __future__ import annotations

import contextlib
import csv
import gc
import html
import io
import re
import socket
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from decimal import Decimal
from urllib.parse import urlencode, urlsplit

import httpx2
import pytest

from redbtc import money
from redbtc.billing.csv import csv_line
from redbtc.dashboard import (
    account_pages,
    formats,
    key_page,
    parts,
    rendering,
    settings_closing,
    settings_page,
)
from tests.dashboard.pages import OPERATORS_PAGES, PAGES, cells
from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    Gateway,
    MakeGateway,
    wait_for_length,
    wait_until,
)
from tests.helpers.logins import PASSWORD, Login, anonymous, log_in, new_user
from tests.helpers.upstream import Received, Reply, Upstream, event, json_answer

pytestmark = [pytest.mark.promise_5, pytest.mark.promise_7]


# ── Changes from elsewhere ───────────────────────────────────────────────────────────────────────


def test_a_change_from_another_site_is_refused(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    login = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    keys = f"/dashboard/accounts/{login.user['account_id']}/keys"
    api = f"/admin/v1/accounts/{login.user['account_id']}/keys"
    link = gateway.api("POST", "/users", {"email": "o@p.q", "account": "a"})["link"]
    passwords = {"password": PASSWORD, "again": PASSWORD}
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": gateway.url.replace("http:", "https:")},
        {"origin": f"{gateway.url}0"},
        {"origin": f"{gateway.url}.evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": gateway.url, "sec-fetch-site": "same-site"},
        {"origin": gateway.url, "sec-fetch-site": "cross-site"},
    ):
        client = login.client
        for answer in (
            client.post(keys, data={"do": "add"}, headers=headers),
            client.post(api, json={}, headers=headers),
            client.post("/dashboard/logout", headers=headers),
            client.post(urlsplit(link).path, data=passwords, headers=headers),
            log_in(client, "ada@example.com", PASSWORD, **headers),
        ):
            assert answer.status_code == 403, (headers, answer.request.url)
    assert gateway.api("GET", "/accounts/a/keys")["keys"] == []
    del login.client.headers["origin"]
    assert login.post(keys, do="add").status_code == 403
    assert login.client.post(api, json={}).status_code == 403
    here = {"origin": gateway.url}
    assert login.client.post(keys, data={"do": "add"}, headers=here).status_code == 200
    assert login.client.post(api, json={}, headers=here).status_code == 201


def test_a_slow_form_and_a_large_one(make_gateway: MakeGateway) -> None:
    gateway = make_gateway("[server]\nbody_timeout_seconds = 2").start()
    for path, most in (("/dashboard/login", 64 << 10), ("/admin/v1/accounts", 0)):
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\nContent-Length:"
        slow = gateway.raw(f"{head} 100\r\n\r\nemail=".encode())
        assert slow.startswith(b"HTTP/1.1 400 " if most else b"HTTP/1.1 401 ")
        large = gateway.raw(f"{head} {most + 1}\r\n\r\n".encode() + b"x" * (most + 1))
        assert large.startswith(b"HTTP/1.1 413 " if most else b"HTTP/1.1 401 ")
    with socket.socket(socket.AF_UNIX) as local:  # what commands use
        local.connect(f"{gateway.database}.sock")
        local.settimeout(PATIENCE_SECONDS)
        local.sendall(b"POST /admin/v1/accounts HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        assert local.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert "Traceback" not in gateway.log()


# ── Roles, and walls between accounts ────────────────────────────────────────────────────────────


def test_the_log_of_changes_is_only_added_to(gateway: Gateway) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    gateway.terminate()
    with sqlite3.connect(gateway.database) as database:
        for sql in (
            "UPDATE changes SET changed_by = 'x'",
            "DELETE FROM changes",
            "REPLACE INTO changes SELECT * FROM changes",
            "UPDATE accounts SET email = 'x'",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                database.execute(sql)
    database.close()


# The client forgets to close a socket whose server dies while it connects.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_change_and_its_line_in_the_log_survive_a_kill_together(gateway: Gateway) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    answered: list[str] = []

    def pay() -> None:
        with contextlib.suppress(httpx2.HTTPError):
            while True:
                payment = gateway.api("POST", "/accounts/a/payments", {"amount": "1"})
                answered.append(payment["id"])

    for enough in (10, 40, 90):
        with ThreadPoolExecutor(2) as pool:
            paying = [pool.submit(pay) for _ in range(2)]
            wait_for_length(answered, enough + 1)
            gateway.kill()
            for each in paying:
                each.result()
        gateway.start()
    paid = {each["id"] for each in gateway.api("GET", "/payments")["payments"]}
    logged = gateway.api("GET", "/changes", limit=1000)["changes"]
    assert {each["object_id"] for each in logged if each["kind"] == "payment"} == paid
    assert paid >= set(answered)
    assert gateway.api("GET", "/accounts/a")["balance"] == str(len(paid))
    gc.collect()  # while that warning is let pass


@pytest.mark.front_door
def test_each_role_against_each_page(gateway: Gateway, closing: Callable[[Login], Login]) -> None:
    for name in ("a", "b"):
        gateway.api("POST", "/accounts", {"name": name})
    operator = closing(new_user(gateway, "op@example.com"))
    owner = closing(new_user(gateway, "owner@example.com", "owner", "a"))
    viewer = closing(new_user(gateway, "viewer@example.com", "viewer", "a"))
    foreign = gateway.api("GET", "/accounts/b")["id"]
    own = str(owner.user["account_id"])
    for name in OPERATORS_PAGES:
        operator.get(f"/dashboard/{name}")
        for member in (owner, viewer):
            member.get(f"/dashboard/{name}", 403)
    for page in PAGES:
        operator.get(f"/dashboard/accounts/{own}{page}")
        for member in (owner, viewer):
            owners = page in ("/members", "/settings")
            refused = page == "/manage" or (owners and member is viewer)
            member.get(f"/dashboard/accounts/{own}{page}", 403 if refused else 200)
            there = member.get(f"/dashboard/accounts/{foreign}{page}", 403 if refused else 404).text
            nowhere = member.get(f"/dashboard/accounts/acct_0{page}", 403 if refused else 404).text
            assert there.replace(foreign, "acct_0") == nowhere
        with anonymous(gateway) as client:
            answer = client.get(f"/dashboard/accounts/{own}{page}")
            assert answer.status_code == 303
            assert answer.headers["location"].startswith("/dashboard/login?next=")
    for form in ({"do": "add", "label": "x"}, {"do": "nonsense"}):
        assert viewer.post(f"/dashboard/accounts/{own}/keys", **form).status_code == 403
    assert gateway.api("GET", "/accounts/a/keys")["keys"] == []


FORMS: dict[str, dict[str, dict[str, str]]] = {
    "/keys": {"add": {}, "rotate": {"overlap": "0"}, "revoke": {}, "compromised": {}},
    "/members": {"add": {"email": "x@y.z", "role": "owner"}, "reset": {}, "remove": {}},
    "/manage": {
        "set": {"concurrency": "1"},
        "suspend": {"reason": "x"},
        "resume": {},
        "throttle": {"factor": "0.5"},
        "pay": {"amount": "1000"},
        "terminate": {"name": "a"},
    },
    "/settings": {
        "log_on": {"days": "1"},
        "log_off": {"purge": "1"},
        "export": {},
        "close": {"name": "b"},
        "keep": {},
    },
}
OPERATORS_FORMS: dict[str, dict[str, dict[str, str]]] = {
    "/accounts": {"add": {"name": "mine"}},
    "/prices": {"add": {"model": "*", "input": "0"}},
    "/notices": {"add": {"kind": "incident", "text": "x"}, "end": {}},
    "/users": {"add": {"email": "x@y.z", "role": "operator"}, "reset": {}, "remove": {}},
}


def test_each_role_against_each_form(gateway: Gateway, closing: Callable[[Login], Login]) -> None:
    assert set(FORMS["/keys"]) == set(key_page.KEY_ACTIONS)
    assert set(FORMS["/members"]) == set(OPERATORS_FORMS["/users"]) == set(parts.USER_ACTIONS)
    managing = {**account_pages.MANAGE_ACTIONS, **settings_closing.TERMINATING_ACTIONS}
    assert set(FORMS["/manage"]) == set(managing)
    assert set(FORMS["/settings"]) == set(settings_page.SETTINGS_ACTIONS)
    for name in ("a", "b"):
        gateway.new_key(name)
    operator = closing(new_user(gateway, "op@example.com"))
    notice = gateway.api("POST", "/notices", {"kind": "incident", "text": "down"})["id"]
    owner = closing(new_user(gateway, "owner@example.com", "owner", "a"))
    viewer = closing(new_user(gateway, "viewer@example.com", "viewer", "a"))
    there = gateway.api("POST", "/users", {"email": "o@b.c", "account": "b"})
    own, foreign = owner.user["account_id"], there["account_id"]
    keys = [gateway.api("GET", f"/accounts/{name}/keys")["keys"][0]["id"] for name in ("a", "b")]
    before = gateway.api("GET", "/changes", limit=1000)["changes"]
    ids = {"notice": notice, "user": operator.user["id"]}
    for page, forms in OPERATORS_FORMS.items():
        for do, form in forms.items():
            for member in (owner, viewer):
                answer = member.post(f"/dashboard{page}", do=do, **{**ids, **form})
                assert answer.status_code == 403, (page, do)
    for page, forms in FORMS.items():
        for do, form in forms.items():
            for at, key, user, status in (
                (own, keys[1], there["id"], 404),  # another's ids on one's own page
                (foreign, keys[1], there["id"], 404),
                (foreign, keys[0], viewer.user["id"], 404),  # one's own on another's
            ):
                if page == "/manage":
                    status = 403
                elif at == own and (do == "add" or page == "/settings"):
                    continue
                sent = {"key": key, "of_key": key, "user": user, **form}
                answer = owner.post(f"/dashboard/accounts/{at}{page}", do=do, **sent)
                assert answer.status_code == status, (page, do, at, answer.text)
                assert not any(each in answer.text for each in (keys[1], "o@b.c"))
            sent = {"key": keys[0], "user": owner.user["id"], **form}
            answer = viewer.post(f"/dashboard/accounts/{own}{page}", do=do, **sent)
            assert answer.status_code == 403, (page, do, answer.text)
    assert gateway.api("GET", "/changes", limit=1000)["changes"] == before
    # What is refused to others is done for who may.
    assert (
        owner.post(f"/dashboard/accounts/{own}/keys", do="rotate", key=keys[0]).status_code == 200
    )
    user = viewer.user["id"]
    removed = owner.post(f"/dashboard/accounts/{own}/members", do="remove", user=user)
    assert removed.status_code == 303
    # An address that is known elsewhere is as good as any other.
    added = owner.post(f"/dashboard/accounts/{own}/members", do="add", email="o@b.c", role="viewer")
    assert (added.status_code, "/dashboard/link/" in added.text) == (200, True)


def test_another_account_s_ids_in_addresses(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    owner = closing(new_user(gateway, "owner@example.com", "owner", "a"))
    key = gateway.new_key("b")
    with gateway.client(key) as client:
        asked = client.post("/responses", json={"model": "gpt-5.5", "input": "x"})
    request_id = asked.headers["x-redbtc-request-id"]
    key_id = gateway.api("GET", "/accounts/b/keys")["keys"][0]["id"]
    foreign = gateway.api("GET", "/accounts/b")["id"]
    own = f"/dashboard/accounts/{owner.user['account_id']}"
    for page, name, there in (
        ("/usage", "key", key_id),
        ("/usage.csv", "key", key_id),
        ("/usage", "before", request_id),
    ):
        answers = [
            owner.get(f"{own}{page}?{name}={value}", 404).text.replace(value, "")
            for value in (there, "0123")
        ]
        assert answers[0] == answers[1]
    for page in ("/usage.csv", "/billing/2026-11/csv"):
        owner.get(f"/dashboard/accounts/{foreign}{page}", 404)
    for name in (foreign, "b", "0123"):
        owner.get(f"/admin/v1/users?account={name}", 404)
    assert owner.get("/admin/v1/users?role=operator").json() == {"users": []}


# ── Figures ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("amount", "currency", "rounded", "exact"),
    [
        ("0", "USD", "0.00", "0.00"),
        ("1234567.895", "USD", "1,234,567.90", "1,234,567.895"),
        ("-0.5", "USD", "-0.50", "-0.50"),
        ("0.000000001", "USD", "< 0.01", "0.000000001"),
        ("-0.004", "EUR", "> -0.01", "-0.004"),
        ("0.005", "USD", "0.01", "0.005"),
        ("1234.5", "JPY", "1,235", "1,234.5"),
        ("0.4", "JPY", "< 1", "0.4"),
        ("1.0005", "KWD", "1.001", "1.0005"),
        ("1", "CLF", "1.0000", "1.0000"),
        ("99999999999999999", "USD", "99,999,999,999,999,999.00", "99,999,999,999,999,999.00"),
    ],
)
def test_money_has_its_currency_s_digits(
    amount: str, currency: str, rounded: str, exact: str
) -> None:
    assert money.money(amount, currency) == rounded
    assert formats.exact(amount, currency) == exact
    column = formats.aligned(amount, currency)
    assert column.strip() == exact
    assert len(column) - column.find(".") == 10 if "." in column else column.endswith("\u2007" * 10)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a refund needs a reason", "A refund needs a reason."),
        ("DALLE is in use", "DALLE is in use."),
        ("gpt-5.5 is in use", "gpt-5.5 is in use."),
    ],
)
def test_a_message_is_a_sentence_and_a_name_stays_as_it_is(text: str, shown: str) -> None:
    assert rendering.sentence(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@a", "\t=1", "\r=1", " =1", "＝1+1"])
def test_a_cell_is_no_formula(text: str) -> None:
    ((_, cell),) = csv.reader(io.StringIO(csv_line([-1.5, text])))
    assert cell == f"'{text}"


@pytest.mark.parametrize(
    ("agent", "called"),
    [
        (
            "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
            "Firefox on Linux",
        ),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
            "Chrome/141.0.0.0 Safari/537.36 Edg/141.0.0.0",
            "Edge on Windows",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, "
            "like Gecko) Version/18.6 Mobile/15E148 Safari/604.1",
            "Safari on iPhone",
        ),
        ("python-httpx/1.0 x", "python-httpx/1.0"),
        ("", "unknown"),
    ],
)
def test_a_browser_is_called_as_people_call_it(agent: str, called: str) -> None:
    assert formats.browser(agent) == called


@pytest.mark.front_door
def test_what_pages_say_is_what_the_ledger_says(
    gateway: Gateway, upstream: Upstream, closing: Callable[[Login], Login]
) -> None:
    gateway.cli("price", "add", "gpt-*", "--input", "1000", "--output", "2000")
    key = gateway.new_key()
    with gateway.client(key) as client:
        for model in ("gpt-5.5", "gpt-5.5", "free"):
            client.post("/responses", json={"model": model, "input": "x"})
        upstream.script = json_answer({"error": {"message": "no"}}, 500)
        client.post("/responses", json={"model": "gpt-5.5", "input": "x"})
    rows = gateway.rows()
    cost = sum(Decimal(row["cost"] or 0) for row in rows)
    assert len(rows) == 4
    assert cost > 0
    today = rows[-1]["started_at"][:10]
    operator = closing(new_user(gateway, "op@example.com"))
    shown = cells(operator.get("/dashboard/overview").text, "Traffic and spend by day")
    assert len(shown) == parts.CHART_DAYS
    assert shown[-1] == [today, "3", "1", formats.exact(f"{cost:f}", "USD")]
    assert set(shown[-2][1:]) == {"0", "0.00"}
    path = f"/dashboard/accounts/{gateway.api('GET', '/accounts/test')['id']}"
    by_model = cells(operator.get(path).text, "Usage by day")
    assert [[*row[:3], row[-1]] for row in by_model] == [
        [today, "free", "1", "0.00"],
        [today, "gpt-5.5", "3", formats.exact(f"{cost:f}", "USD")],
    ]
    of_models = operator.get("/admin/v1/usage?group_by=day,model&top=1").json()
    assert [(row["model"], row["requests"]) for row in of_models["groups"]] == [
        (None, 1),
        ("gpt-5.5", 3),
    ]
    assert of_models["totals"]["requests"] == 4
    month = cells(operator.get(f"{path}/billing").text, "Statements by month")
    assert month == [[today[:7], "in progress", "4", money.money(f"{cost:f}", "USD"), "0.00"]]
    statement = html.unescape(operator.get(f"{path}/billing/{today[:7]}").text)
    assert f"exact: -{formats.exact(f'{cost:f}', 'USD')}<" in statement
    assert "4 requests: 0 estimated, 1 reported no usage." in statement
    day = date.fromisoformat(today)
    for since, until, count in ((day, day, 4), (None, day - timedelta(1), 0), (day, None, 4)):
        query = {"since": since, "until": until}
        asked = urlencode({name: str(value) for name, value in query.items() if value})
        text = operator.get(f"{path}/usage?{asked}").text
        assert len(cells(text, "Requests, newest first")) == count, asked


def test_the_usage_page_says_why_requests_failed(
    gateway: Gateway, upstream: Upstream, closing: Callable[[Login], Login]
) -> None:
    key = gateway.new_key()
    with gateway.client(key) as client:
        client.post("/responses", json={"model": "good", "input": "x"})
        for status, code in ((429, "rate_limit_exceeded"), (500, "<b>bold</b>")):
            error = {"message": "secret text", "code": code}
            upstream.script = json_answer({"error": error}, status)
            client.post("/responses", json={"model": f"m-{status}", "input": "x"})
    account = gateway.api("GET", "/accounts/test")["id"]
    viewer = closing(new_user(gateway, "viewer@example.com", account="test", role="viewer"))
    path = f"/dashboard/accounts/{account}/usage"
    for query, models in (
        ("", ["m-500", "m-429", "good"]),
        ("?failed=&failure=", ["m-500", "m-429", "good"]),
        ("?failed=true", ["m-500", "m-429"]),
        ("?failure=429", ["m-429"]),
        ("?failed=true&failure=rate_limit_exceeded", ["m-429"]),
        ("?failure=nothing", []),
    ):
        text = viewer.get(path + query).text
        assert [row[1] for row in cells(text, "Requests, newest first")] == models, query
        assert "secret text" not in text
        assert "bold" not in text
        listed = csv.DictReader(io.StringIO(viewer.get(f"{path}.csv{query}").text))
        assert [row["requested_model"] for row in listed] == models, query
    failed = viewer.get(f"{path}?failed=true").text
    assert '<option value="true" selected>' in failed
    assert "429 rate_limit_exceeded" in failed
    refused = viewer.get(f"{path}?failed=maybe")
    assert 'role="alert"' in refused.text


# ── Keys and limits ──────────────────────────────────────────────────────────────────────────────


def test_a_compromised_key_is_cut(gateway: Gateway, upstream: Upstream) -> None:
    key, other = gateway.new_key(), gateway.new_key()
    release = threading.Event()

    async def one_event_then_wait(_: Received, reply: Reply) -> None:
        await reply.head(200, {"content-type": "text/event-stream"})
        await reply.send(event({"id": "c", "model": "m", "choices": []}))
        await reply.wait(release)
        await reply.send(b"data: [DONE]\n\n")
        await reply.end()

    upstream.script = one_event_then_wait
    chat = {"model": "m", "messages": [], "stream": True}

    def ask(shown: str) -> bool:
        """Return whether the answer was complete."""
        try:
            with gateway.client(shown) as client:
                return "[DONE]" in client.post("/chat/completions", json=chat).text
        except httpx2.HTTPError:
            return False

    with ThreadPoolExecutor(4) as pool:
        cut = [pool.submit(ask, key) for _ in range(3)]
        kept = pool.submit(ask, other)
        wait_until(lambda: len(upstream.requests) == 4)
        key_id = gateway.api("GET", "/accounts/test/keys")["keys"][0]["id"]
        revoked = gateway.cli("key", "revoke", "--compromised", key_id)
        assert (revoked["cut"], revoked["compromised"]) == (3, True)
        assert [each.result(PATIENCE_SECONDS) for each in cut] == [False] * 3
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 1)
        outcomes = [row["outcome"] for row in gateway.rows(key=key_id)]
        assert outcomes == ["client_disconnected"] * 3
        release.set()
        assert kept.result(PATIENCE_SECONDS)
    with gateway.client(key) as client:
        assert client.post("/chat/completions", json=chat).status_code == 401


def test_a_throttled_account_has_a_part_of_its_limits(gateway: Gateway) -> None:
    key = gateway.new_key("a", concurrency=8, requests_per_minute=100)
    throttled = gateway.cli("account", "throttle", "a", "--factor", "0.25", "--until", "1h")
    assert throttled["throttle_factor"] == "0.25"
    headers = {"authorization": f"Bearer {key}"}
    found = gateway.get("/admin/v1/me/limits", headers=headers).json()["account"]
    assert found["concurrency"]["limit"] == 2
    assert found["requests_per_minute"]["limit"] == 25
    assert gateway.cli("account", "throttle", "a", "--factor", "1")["throttle_factor"] is None
    found = gateway.get("/admin/v1/me/limits", headers=headers).json()["account"]
    assert found["concurrency"]["limit"] == 8


def test_a_maintenance_refuses_requests(gateway: Gateway, key: str) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    notice = gateway.cli(
        "notice", "add", "--kind", "maintenance", "--until", "1h", "--refuse-requests", "Back soon."
    )
    with gateway.client(key) as client:
        refused = client.post("/chat/completions", json=chat)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "maintenance"
        assert refused.json()["error"]["message"] == "Back soon."
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        gateway.cli("notice", "withdraw", notice["id"])
        assert client.post("/chat/completions", json=chat).status_code == 200


def test_a_form_is_done_once_however_often_it_is_sent(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    account = gateway.api("POST", "/accounts", {"name": "a"})
    operator = closing(new_user(gateway, "op@example.com"))
    other = closing(new_user(gateway, "grace@example.com"))
    manage = f"/dashboard/accounts/{account['id']}/manage"

    def once() -> str:
        found = re.findall(r'name="do" value="pay">.*?name="once" value="(\w+)"', html_of(manage))
        return str(found[0])

    def html_of(path: str) -> str:
        return operator.get(path).text

    form = once()
    assert form != once()
    refused = operator.post(manage, do="pay", once=form, amount="x")
    assert refused.status_code == 400
    statuses = [operator.post(manage, do="pay", once=form, amount="5").status_code for _ in "ab"]
    assert statuses == [303, 409]
    assert [each["amount"] for each in gateway.api("GET", "/payments")["payments"]] == ["5"]
    assert other.post(manage, do="pay", once=form, amount="-5", reason="x").status_code == 303
    with ThreadPoolExecutor(2) as pool:
        form = once()
        at_once = [
            pool.submit(operator.post, manage, do="pay", once=form, amount="5") for _ in "ab"
        ]
        assert sorted(each.result().status_code for each in at_once) == [303, 409]


def test_texts_and_amounts_at_their_limits(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.new_key("a")
    operator = closing(new_user(gateway, "op@example.com"))
    account = gateway.api("GET", "/accounts/a")["id"]
    manage, keys = (f"/dashboard/accounts/{account}/{page}" for page in ("manage", "keys"))
    for amount, status in (
        ("999999999999999999", 409),
        ("99999999999999999", 303),
        ("99999999999999999", 409),
        ("-99999999999999999", 303),
    ):
        form = {"do": "pay", "amount": amount, "reason": "x"}
        assert operator.post(manage, **form).status_code == status, amount
    operator.get(manage)
    operator.get("/dashboard/accounts")
    for field, text, problem in (
        ("label", "x" * 201, "Expected at most 200 characters."),
        ("models", ",".join(["m"] * 101), "Found 101 model patterns; a key can have at most 100."),
        ("models", "m[*?" * 4, "A model pattern can have at most 10 of the characters * ? [."),
        ("monthly_budget", "lots", "Expected an amount such as 12.50"),
        ("expires", "2026-13-45", "is not a time"),
    ):
        refused = operator.post(keys, do="add", **{field: text})
        assert problem in html.unescape(refused.text), field
        assert refused.status_code in (400, 409)
    assert len(gateway.api("GET", "/accounts/a/keys")["keys"]) == 1
    usage = operator.get(f"/dashboard/accounts/{account}/usage?since=2026-02-31").text
    assert "2026-02-31" in usage
    assert 'role="alert"' in usage


@pytest.mark.parametrize("do", ["remove", "reset"])
def test_nobody_ends_their_own_login(
    gateway: Gateway, closing: Callable[[Login], Login], do: str
) -> None:
    """Users can't reset or remove their own login, so that an open browser does not give a stranger
    a new link."""
    operator = closing(new_user(gateway, "op@example.com"))
    answer = operator.post("/dashboard/users", do=do, user=operator.user["id"])
    assert (answer.status_code, "your own login" in answer.text) == (409, True)
    operator.get("/dashboard/users")
