"""The dashboard on a large ledger: all rows are reached once, and nobody is held up."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import re
import socket
import sqlite3
from collections.abc import Callable

import httpx2
import pytest

from bench.bench import fill
from redbtc.dashboard import account_pages, parts
from redbtc.gateway.admin_routes import MAX_ASKED
from tests.dashboard.pages import OPERATORS_PAGES, PAGES, cells
from tests.helpers.gateway import WITHOUT_COLLECTIONS, Gateway, MakeGateway, wait_until
from tests.helpers.logins import Login, anonymous, new_user
from tests.helpers.speed import Stalls, calmest, process_seconds, unit

pytestmark = [pytest.mark.promise_5, pytest.mark.promise_7]

QUICK_UNITS = 70  # 50 ms on an ordinary machine
FILTERS = [
    "?key=key_1",
    "?model=m0",
    "?model=none",
    "?since=2026-01-01&until=2026-02-01",
    "?failed=true",
    "?failure=none",
]


@pytest.mark.slow
def test_every_page_is_quick_on_a_large_ledger(
    make_gateway: MakeGateway, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway()
    gateway.cli("db", "check")  # makes the database
    fill(gateway.database, 200_000, 1000)
    gateway.start()
    names = [f"of-many-{number:04}" for number in range(1500)]
    gateway.api("POST", "/prices", {"prices": [{"model": names, "input": "1"}]})
    operator = closing(new_user(gateway, "op@example.com"))
    pages = [f"/{name}" for name in (*OPERATORS_PAGES, "you", "accounts?search=99")]
    pages += [f"/accounts/acct_1{page}" for page in PAGES]
    pages += [f"/accounts/acct_1/usage{query}" for query in FILTERS]
    pages += [f"/{page}?model=of-many-7" for page in ("prices", "accounts/acct_1/billing")]
    took: dict[str, float] = {}
    measure = unit()
    for page in pages:
        for _ in range(5):
            began = process_seconds(gateway.pid)
            operator.get(f"/dashboard{page}")
            units = (process_seconds(gateway.pid) - began) / measure
            took[page] = min(took.get(page, units), units)
    assert {page: units for page, units in took.items() if units > QUICK_UNITS} == {}
    for page in ("prices", "accounts/acct_1/billing"):  # all once, as many as are searched for
        shown, query = [], "model=of-many-12"
        while query:
            text = operator.get(f"/dashboard/{page}?{query}").text
            shown += [row[0] for row in cells(text, "Per million tokens")]
            query = html.unescape("".join(re.findall(r'rel="next" href="\?(.*)#prices"', text)))
        assert shown == names[1200:1300]
    used = operator.get("/dashboard/accounts/acct_1/usage?model=none").text
    assert "No requests in this period." in used


def test_a_csv_file_breaks_off_with_its_session(
    make_gateway: MakeGateway, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway()
    gateway.cli("db", "check")
    fill(gateway.database, 60_000, 1)
    gateway.start()
    operator = closing(new_user(gateway, "op@example.com"))
    path = "/dashboard/accounts/acct_1/usage.csv"
    assert operator.get(path).text.count("\r\n") == 60_001
    with operator.client.stream("GET", path) as answer:
        parts = answer.iter_raw()
        next(parts)
        gateway.api("DELETE", f"/users/{operator.user['id']}")
        with pytest.raises(httpx2.HTTPError):
            list(parts)


@pytest.fixture
def steady(make_gateway: MakeGateway) -> Gateway:
    """A running gateway in which no garbage collection comes between two steps of work."""
    gateway = make_gateway()
    gateway.prelude = WITHOUT_COLLECTIONS
    return gateway.start()


def test_no_stranger_s_cookie_or_form_holds_the_others_up(steady: Gateway) -> None:
    """Python's own parser takes seconds for this cookie, and 25 ms for this form; this Accept took
    40 ms."""
    hold_up(steady)  # the first time, pages are compiled
    assert calmest(lambda: hold_up(steady), 30) < 30


def hold_up(gateway: Gateway) -> float:
    """Send what takes long to parse; return for how long that held up others, in units."""
    cookie = 'a="' + '\\"' * 30_000 + '"'
    form = "%41&" * 16_000
    with anonymous(gateway) as client, Stalls(gateway.port) as stalls:
        for path in ("/dashboard/overview", "/dashboard/login", "/admin/v1/accounts"):
            assert client.get(path, headers={"cookie": cookie}).status_code in (200, 303, 401)
        kind = "application/x-www-form-urlencoded"
        headers = {"cookie": cookie, "content-type": kind}
        assert client.post("/dashboard/login", data={"email": "a"}, headers=headers).is_error
        headers["cookie"] = ";" * 60_000
        worst = ("a=" + "é%" * 21_000).encode()
        assert client.post("/dashboard/login", content=worst, headers=headers).is_error
        many = client.post("/dashboard/login", content=form, headers={"content-type": kind})
        assert many.status_code == 400
        assert client.get("/status", headers={"accept": "*/*" + " ," * 30_000}).is_success
    return stalls.longest


def test_no_member_s_query_or_body_holds_the_others_up(
    steady: Gateway, closing: Callable[[Login], Login]
) -> None:
    """These took 25 and 95 ms."""
    steady.new_key("a")
    viewer = closing(new_user(steady, "v@example.com", "viewer", "a"))
    query = "".join(f"{number:x}&" for number in range(12_000))
    body = b'{"x":[' + b"1.5," * 1_000_000 + b"1]}"

    def longest() -> float:
        with Stalls(steady.port) as stalls:
            refused = viewer.get(f"/dashboard/accounts/a/keys?{query}", 400).text
            assert viewer.client.post("/admin/v1/login/password", content=body).status_code == 413
        assert "at most 100 are allowed" in refused
        return stalls.longest

    longest()  # the first time, pages are compiled
    assert calmest(longest, 20) < 20


def test_no_pattern_of_a_key_holds_the_others_up(
    steady: Gateway, closing: Callable[[Login], Login]
) -> None:
    """A pattern of 4,000 brackets took 300 ms to compile; so did matching a model of 20 KB."""
    steady.new_key("a")
    owner = closing(new_user(steady, "o@example.com", "owner", "a"))
    path = "/admin/v1/accounts/a/keys"

    def add(models: list[str]) -> httpx2.Response:
        return owner.client.post(path, json={"models": models})

    for models in (["[" * 250], ["*a" * 11], ["x" * 41] * 99):
        assert add(models).status_code == 409
    assert owner.client.post(path, json={"models": "[" * 4000}).status_code == 409
    costly = [
        ["*" + "a" * 110 + "b*" + "a" * 110 + f"c{number}" for number in range(16)],
        ["*a" * 9 + "x" * 17 + f"{number}" for number in range(100)],
    ]
    keys = [add(models).json()["key"] for models in costly]
    with Stalls(steady.port) as stalls:
        for key in keys:
            with steady.client(key) as client:
                for name in ("a" * 256, "a" * 20_000):
                    assert client.get(f"/models/{name}").status_code == 404
    assert stalls.longest < 60


def test_a_user_who_reads_slowly_takes_little(
    make_gateway: MakeGateway, closing: Callable[[Login], Login]
) -> None:
    """Each of these downloads took 2 MB until it was read, and their number had no limit."""
    gateway = make_gateway()
    gateway.cli("db", "check")
    fill(gateway.database, 3_000, 1)
    gateway.start()
    operator = closing(new_user(gateway, "op@example.com"))
    path = "/dashboard/accounts/acct_1/usage.csv"
    head = f"GET {path} HTTP/1.1\r\nhost: a\r\ncookie: redbtc={operator.client.cookies['redbtc']}"
    operator.get(path)
    before = gateway.rss()
    with contextlib.ExitStack() as stack:
        answers = []
        for _ in range(MAX_ASKED + 10):
            sock = stack.enter_context(socket.socket())
            # What the kernel takes is little with short segments.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            sock.connect(("127.0.0.1", gateway.port))
            sock.sendall(f"{head}\r\n\r\n".encode())
            answers.append(sock.recv(12)[9:])
        assert answers == [b"200"] * MAX_ASKED + [b"429"] * 10
        wait_until(lambda: gateway.rss() - before < MAX_ASKED << 20)
    wait_until(lambda: operator.client.get(path).status_code == 200)


def test_the_pages_of_the_usage_page_are_all_requests_once(
    gateway: Gateway, key: str, closing: Callable[[Login], Login]
) -> None:
    with gateway.client(key) as client:
        for number in range(120):
            body = {"model": f"gpt-{number % 3}", "input": "x"}
            assert client.post("/responses", json=body).status_code == 200
    operator = closing(new_user(gateway, "op@example.com"))
    path = f"/dashboard/accounts/{gateway.api('GET', '/accounts/test')['id']}/usage"
    for query, count in (("", 120), ("?model=gpt-1", 40)):
        seen: list[str] = []
        at = f"{path}{query}"
        while at:
            text = operator.get(at).text
            seen += re.findall(r"<code>(req_\w+)</code>", text)
            older = re.search(r'rel="next" href="([^"]+)"', text)
            at = f"{path}{html.unescape(older[1])}" if older else ""
        rows = gateway.rows(**({"model": "gpt-1"} if query else {}))
        assert seen == [row["request_id"] for row in rows][::-1]
        assert len(seen) == count
        table = operator.get(f"{path}.csv{query}").text
        assert [line["request_id"] for line in csv.DictReader(io.StringIO(table))] == seen
    assert operator.get(f"{path}.csv?model=none").text.strip() == ",".join(rows[0])


def test_the_pages_of_keys_are_all_keys_once(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    made = [gateway.api("POST", "/accounts/a/keys", {})["id"] for _ in range(parts.PAGE_ROWS + 1)]
    owner = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    path = f"/dashboard/accounts/{owner.user['account_id']}/keys"
    first = owner.get(path).text
    assert 'href="?page=2"' in first
    second = owner.get(f"{path}?page=2").text
    assert "page=3" not in second
    shown = [re.findall(r"<code>(key_\w+)</code>", text) for text in (first, second)]
    assert [len(each) for each in shown] == [parts.PAGE_ROWS, 1]
    assert [*shown[0], *shown[1]] == made[::-1]
    assert 'rel="prev" href="?page=1"' in second
    assert "Page 2 of 2" in second
    revoked = owner.post(f"{path}?page=2", do="revoke", key=shown[1][0])
    assert (revoked.status_code, revoked.headers["location"]) == (303, "?page=2&done")
    for page, count in (("0", 50), ("3", 1), ("999999", 1), ("-1", 50), ("x", 50), ("9" * 400, 50)):
        text = owner.get(f"{path}?page={page}").text
        assert text.count("<code>key_") == count, page


def test_the_pages_of_accounts_are_all_accounts_once(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    names = [f"a {number:02}" for number in range(parts.PAGE_ROWS + 1)]
    for name in names:
        gateway.api("POST", "/accounts", {"name": name})
    operator = closing(new_user(gateway, "op@example.com"))
    query, shown = "?search=a", []
    while query:
        text = operator.get(f"/dashboard/accounts{query}").text
        shown += [row[0] for row in cells(text, "Accounts by name")]
        query = html.unescape("".join(re.findall(r'rel="next" href="(.*?)"', text)))
    assert shown == names
    after = gateway.api("GET", "/accounts", after=names[7], limit=1)["accounts"]
    assert [each["name"] for each in after] == [names[8]]


def test_what_a_key_is_held_to_is_on_its_page_and_whose_a_change_is_in_the_log(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    gateway.api("POST", "/users", {"email": "bob@example.com", "account": "a"})
    gateway.api("POST", "/users/bob@example.com/reset")
    operator = closing(new_user(gateway, "op@example.com"))
    path = f"/dashboard/accounts/{gateway.api('GET', '/accounts/a')['id']}"
    form = {"label": "laptop", "concurrency": "3", "requests_per_minute": "1200"}
    operator.post(f"{path}/keys", do="add", **form, tokens_per_minute="9", monthly_budget="7")
    ((*_, limits, last_used, _),) = cells(
        operator.get(f"{path}/keys").text, "Keys, active keys first"
    )
    limits = " ".join(limits.split())
    assert limits == "3 in flight 1,200 requests per minute 9 tokens per minute 7.00 USD per month"
    assert last_used == "never"
    key = gateway.api("GET", "/accounts/a/keys")["keys"][0]["id"]
    told = operator.post(f"{path}/keys", do="compromised", key=key).text
    assert "0 requests in flight stopped." in told
    log = operator.get("/dashboard/log").text
    for kind, name in (("Key", "laptop"), ("User", "bob@example.com")):
        assert re.search(rf"{kind}</strong>\s+changed[^<]*<bdi>a</bdi> · <bdi>{name}</bdi>", log)
    assert operator.post(
        "/dashboard/you", do="end", session="ses_0123456789abcdef"
    ).status_code == (404)


def test_the_status_page_shows_so_many_notices(gateway: Gateway) -> None:
    for number in range(52):
        gateway.api("POST", "/notices", {"kind": "incident", "text": f"notice {number:03}"})
    text = gateway.get("/status", headers={"accept": "text/html"}).text
    assert len(re.findall(r"notice \d{3}", text)) == 50
    assert "2 more notices" in text


def test_the_pages_of_notices_are_all_notices_once(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    most = parts.PAGE_ROWS
    texts = [f"notice {number:03}" for number in range(most + 1)]
    for text in texts:
        gateway.api("POST", "/notices", {"kind": "incident", "text": text})
    owner = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    operator = closing(new_user(gateway, "op@example.com"))
    account = f"/dashboard/accounts/{owner.user['account_id']}"
    for login, page in ((owner, f"{account}/notices"), (operator, "/dashboard/notices")):
        found = [login.get(f"{page}?page={number}").text for number in (1, 2)]
        shown = [list(dict.fromkeys(re.findall(r"notice \d{3}", text))) for text in found]
        assert shown == [texts[:0:-1], texts[:1]]
    overview = owner.get(account).text
    assert re.findall(r"notice \d{3}", overview) == texts[: -account_pages.MAX_NOTICES - 1 : -1]
    assert f">{most + 1 - account_pages.MAX_NOTICES} more notices<" in overview


HELD_UNITS = 100  # 70 ms on an ordinary machine
PILED_UP = """
    INSERT INTO acting VALUES (1, 'test', 1);
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
    INSERT INTO usage_by_day (account_id, month, day, model, requested_model, key_id, requests,
        estimated, unreported, cost_units, cost_nanos)
    SELECT account_id, month, day, 'name ' || i, 'name ' || i, key_id, 1, 0, 1, 0, i
      FROM n, usage_by_day;
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
    INSERT INTO keys (id, hash, account_id, created_at)
    SELECT 'key_' || i, randomblob(32), accounts.id, 1 FROM n, accounts;
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
    INSERT INTO requests (request_id, account_id, key_id, endpoint, requested_model, upstream,
        started_at, outcome, usage_source, month)
    SELECT printf('req_%032x', i), account_id, key_id, '/v1/responses', 'm', 'test',
        started_at, 'pending', 'none', month FROM n, requests;
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 4000)
    INSERT INTO prices (id, model, tier, above_input_tokens, effective_at, input, currency,
        created_at, added_by)
    SELECT 1000 + i, 'vendor/' || i, 'default', 0, i, 1, 'USD', 1, 'test' FROM n;
    DELETE FROM acting;"""


def test_what_an_account_piles_up_makes_nobody_wait(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    """An account has 40,000 names of models, 3,000 keys and requests in flight, and 4,000 prices:
    its pages are made in slices and don't show all rows."""
    account = gateway.api("POST", "/accounts", {"name": "a"})
    key = gateway.api("POST", "/accounts/a/keys", {})
    with gateway.client(key["key"]) as client:
        client.post("/responses", json={"model": "m", "input": "Hi"})
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.executescript(PILED_UP)
    gateway.start()
    login = closing(new_user(gateway, "ada@example.com", "owner", "a"))

    def add_prices() -> int:
        """Add prices of many models at once. Return the size of the answer, in characters."""
        names = ["vendor/*", *(f"vendor/{number}" for number in range(500))]
        prices = [{"model": names, "tier": next(tiers), "input": "1"}]
        return len(str(gateway.api("POST", "/prices", {"prices": prices})))

    tiers = iter(("flex", "priority"))
    month = account["month"]
    page, api = f"/dashboard/accounts/{account['id']}", f"/admin/v1/accounts/{account['id']}"
    sizes: dict[str, int] = {}
    longest: dict[str, float] = {}
    for path in (
        *(f"{page}{end}" for end in ("", "/keys", "/usage", "/billing")),
        *(f"{page}/billing/{month}{end}" for end in ("", "/csv")),
        f"{page}/usage.csv",
        f"{api}/statements/{month}",
        "/admin/v1/usage?group_by=day,model",
        "/admin/v1/requests?limit=1000",
        f"{api}/prices",
        make_key := "a key made",
        "prices added",
    ):
        with Stalls(gateway.port) as stalls:
            if path == make_key:
                sizes[path] = len(login.post(f"{page}/keys", do="add").content)
            elif path.startswith("/"):
                sizes[path] = len(login.get(path).content)
            else:
                sizes[path] = add_prices()
        longest[path] = stalls.longest
    assert {path: units for path, units in longest.items() if units > HELD_UNITS} == {}
    pages = {
        path: size for path, size in sizes.items() if path.startswith(page) and "csv" not in path
    }
    assert max(pages.values()) < 1_000_000, pages
    assert sizes[f"{page}/billing/{month}/csv"] > 1_000_000
    assert (
        "Showing the first 500 lines. The CSV has all of them."
        in login.get(f"{page}/billing/{month}").text
    )
