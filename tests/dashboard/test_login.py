"""Logging in to the dashboard: links, passwords, attempts, sessions."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx2
import pytest
from starlette.requests import Request

from redbtc.admin.passwords import site_of
from redbtc.dashboard.sessions import network_of
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.logins import OTHER_PASSWORD, PASSWORD, Login, anonymous, log_in, new_user
from tests.helpers.speed import process_seconds

pytestmark = [pytest.mark.promise_5, pytest.mark.promise_7]


@pytest.fixture
def quick(make_gateway: MakeGateway) -> Gateway:
    """A gateway that many passwords can be tried at."""
    return make_gateway(PYTHONPATH=str(Path(__file__).parent / "quick")).start()


def test_a_link_is_used_once_and_looking_at_it_uses_nothing(gateway: Gateway) -> None:
    user = gateway.api("POST", "/users", {"email": "Ada@Example.com", "role": "operator"})
    assert user["email"] == "ada@example.com"
    path = urlsplit(user["link"]).path
    with anonymous(gateway) as client:
        for _ in range(2):
            assert client.get(path).status_code == 200
        short = client.post(path, data={"password": "short", "again": "short"})
        assert (short.status_code, "at least 15 characters" in short.text) == (409, True)
        differ = client.post(path, data={"password": PASSWORD, "again": OTHER_PASSWORD})
        assert differ.status_code == 409
        right = {"password": PASSWORD, "again": PASSWORD}
        assert client.post(path, data=right).status_code == 303
        assert client.post(path, data=right).status_code == 404
        assert client.get(path).status_code == 404
        assert client.get("/dashboard/overview").status_code == 200
    with sqlite3.connect(gateway.database) as database:
        dump = "\n".join(database.iterdump())
    database.close()
    assert path.rpartition("/")[2] not in dump
    assert PASSWORD not in dump


def test_the_cookie_and_the_headers_of_pages(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    login = closing(new_user(gateway, "ada@example.com"))
    with anonymous(gateway) as client:
        answer = log_in(client, "ADA@example.com ", PASSWORD)
        cookies = answer.headers.get_list("set-cookie")
        assert answer.status_code == 303
        assert all("HttpOnly" in each and "SameSite=strict" in each for each in cookies)
        assert all("Secure" not in each for each in cookies)  # without TLS it would be lost
        secure = log_in(
            client,
            "ada@example.com",
            PASSWORD,
            **{"x-forwarded-proto": "https", "origin": gateway.url.replace("http:", "https:")},
        )
        assert secure.status_code == 303
        for each in secure.headers.get_list("set-cookie"):
            assert each.startswith("__Host-redbtc")
            assert all(part in each for part in ("Secure", "Path=/", "HttpOnly", "SameSite=strict"))
    login.client.headers["accept"] = "text/html"
    account = gateway.api("POST", "/accounts", {"name": "a"})["id"]
    for path, status in (
        ("overview", 200),
        ("", 303),
        (f"accounts/{account}/usage.csv", 200),
        ("nowhere", 404),
        ("logout", 405),
        ("link/used-up", 404),
        ("login", 200),
        ("../status", 200),
    ):
        headers = login.get(f"/dashboard/{path}", status).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_a_session_is_new_at_login_and_ends_for_good(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    login = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    with anonymous(gateway, cookie="redbtc=chosen-by-somebody-else") as client:  # fixation
        answer = log_in(client, "ada@example.com", PASSWORD)
        assert "chosen" not in answer.headers["set-cookie"]
        assert client.get("/dashboard/you").status_code == 303

    def value_of(client: httpx2.Client) -> str:
        return str(client.cookies["redbtc"])

    def is_in(cookie: str) -> bool:
        with anonymous(gateway, cookie=f"redbtc={cookie}") as client:
            return client.get("/dashboard/you").status_code == 200

    first = value_of(login.client)
    assert is_in(first)
    assert log_in(login.client, "ada@example.com", "wrong").status_code == 403
    assert is_in(first)
    assert log_in(login.client, "ada@example.com", PASSWORD).status_code == 303
    assert not is_in(first)  # the browser could end it no more
    first = value_of(login.client)
    assert is_in(first)
    assert login.post("/dashboard/logout").status_code == 303
    assert not is_in(first)
    assert log_in(login.client, "ada@example.com", PASSWORD).status_code == 303
    second = value_of(login.client)
    form = {"old_password": PASSWORD, "new_password": OTHER_PASSWORD, "again": OTHER_PASSWORD}
    form["do"] = "password"
    assert login.post("/dashboard/you", **{**form, "old_password": "x"}).status_code == 409
    assert is_in(second)
    assert login.post("/dashboard/you", **form).status_code == 303
    assert not is_in(second)
    third = value_of(login.client)
    assert is_in(third)
    gateway.api("POST", "/accounts/a/suspend", {})
    assert not is_in(third)
    suspended = log_in(login.client, "ada@example.com", OTHER_PASSWORD)
    assert (suspended.status_code, "suspended" in suspended.text) == (403, True)
    gateway.api("POST", "/accounts/a/resume")
    assert not is_in(third)
    assert log_in(login.client, "ada@example.com", OTHER_PASSWORD).status_code == 303
    fourth = value_of(login.client)
    gateway.api("POST", "/users/ada@example.com/reset")
    assert not is_in(fourth)
    assert log_in(login.client, "ada@example.com", OTHER_PASSWORD).status_code == 403


def test_a_session_ends_without_use_and_in_any_case(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    login = closing(new_user(gateway, "ada@example.com"))

    def move(column: str, minutes: float) -> None:
        gateway.terminate()  # which writes what was noted
        with sqlite3.connect(gateway.database) as database:
            sql = f"UPDATE sessions SET {column} = {column} - ?"
            assert database.execute(sql, (round(minutes * 60_000),)).rowcount == 1
        database.close()
        gateway.start()

    move("seen_at", 29)
    login.get("/dashboard/you")  # which is noted
    move("seen_at", 29)
    login.get("/dashboard/you")
    move("created_at", 12 * 60 - 5)
    login.get("/dashboard/you")
    move("created_at", 5)
    login.get("/dashboard/you", 303)
    again = closing(new_user(gateway, "bob@example.com"))  # whose login clears that one away
    move("seen_at", 31)
    again.get("/dashboard/you", 303)


def test_an_unknown_address_takes_as_long(gateway: Gateway) -> None:
    new_user(gateway, "ada@example.com").client.close()
    gateway.api("POST", "/users", {"email": "new@example.com", "role": "operator"})
    took: dict[str, float] = {}
    with anonymous(gateway) as client:
        for _ in range(4):
            for email in ("ada@example.com", "new@example.com", "nobody@example.com"):
                began = process_seconds(gateway.pid)
                assert log_in(client, email, "wrong").status_code == 403
                spent = process_seconds(gateway.pid) - began
                took[email] = min(took.get(email, spent), spent)
    assert max(took.values()) < 1.5 * min(took.values()), took


def test_who_guesses_is_slowed_down_and_learns_nothing(quick: Gateway) -> None:
    new_user(quick, "ada@example.com").client.close()
    with anonymous(quick) as client:
        known = log_in(client, "ada@example.com", "wrong")
        unknown = log_in(client, "bob@example.com", "wrong")
        assert known.status_code == unknown.status_code == 403
        assert known.text.replace("ada@", "bob@") == unknown.text
        answers = [log_in(client, "ada@example.com", f"wrong {i}").status_code for i in range(12)]
        assert answers[-1] == 429
        waiting = log_in(client, "ada@example.com", PASSWORD)
        assert (waiting.status_code, "Too many login attempts" in waiting.text) == (429, True)
        assert 1 <= int(waiting.headers["retry-after"]) <= 60


def test_a_network_is_an_address_or_a_64th_of_ipv6() -> None:
    def network(host: str) -> str:
        return network_of(Request({"type": "http", "client": (host, 1)}))

    assert network("10.0.0.1") != network("10.0.0.2")
    assert network("2001:db8::1:2:3:4") == network("2001:db8:0:0:ffff::")
    assert network("2001:db8::1") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1")
    assert site_of(network("2001:db8::1")) == site_of(network("2001:db8:0:ffff::1"))
    assert site_of(network("2001:db8::1")) != site_of(network("2001:db8:1::1"))
    for other in ("10.0.0.1", "10.0.0.1:80", "fe80::1%eth0", "unknown", ""):
        assert site_of(network(other)) in (network(other), "fe80::/48")


def test_guessing_from_a_network_keeps_nobody_elsewhere_out(
    quick: Gateway, closing: Callable[[Login], Login]
) -> None:
    """Neither with guesses for one address, nor with one for each of many."""
    closing(new_user(quick, "ada@example.com"))
    with anonymous(quick) as client:
        for emails in (["ada@example.com"] * 12, [f"{number}@b.c" for number in range(34)]):
            answers = [log_in(client, email, "wrong").status_code for email in emails]
            assert answers[-1] == 429
            there = {"x-forwarded-for": "10.0.0.1"}
            assert log_in(client, "ada@example.com", PASSWORD, **there).status_code == 303
        assert log_in(client, "ada@example.com", PASSWORD).status_code == 429


def test_who_has_logins_of_an_address_learns_of_no_other(
    quick: Gateway, closing: Callable[[Login], Login]
) -> None:
    quick.api("POST", "/accounts", {"name": "a"})
    closing(new_user(quick, "op@example.com"))
    statuses = []
    for email in ("op@example.com", "nobody@example.com"):
        user = quick.api("POST", "/users", {"email": email, "account": "a"})
        form = {"password": OTHER_PASSWORD, "again": OTHER_PASSWORD}
        with anonymous(quick) as client:
            client.post(urlsplit(user["link"]).path, data=form)
        seen = []
        for _ in range(8):
            with anonymous(quick) as client:
                seen.append(log_in(client, email, OTHER_PASSWORD).status_code)
        statuses.append(seen)
    assert statuses == [[303] * 8] * 2


def test_guessing_the_old_password_in_a_session_is_slowed_down(
    quick: Gateway, closing: Callable[[Login], Login]
) -> None:
    login = closing(new_user(quick, "ada@example.com"))
    password = {"old_password": "wrong", "new_password": OTHER_PASSWORD}
    path = "/admin/v1/login/password"
    statuses = [login.client.post(path, json=password).status_code for _ in range(12)]
    assert (statuses[0], statuses[-1]) == (409, 429)
    form = {"do": "password", **password, "again": OTHER_PASSWORD}
    waiting = login.client.post("/dashboard/you", data=form)
    assert (waiting.status_code, waiting.headers.get("retry-after", "").isdigit()) == (429, True)


def test_several_logins_with_one_password(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    operator = closing(new_user(gateway, "ada@example.com"))
    member = closing(new_user(gateway, "ada@example.com", "viewer", "a"))
    with anonymous(gateway) as client:
        which = log_in(client, "ada@example.com", PASSWORD)
        assert which.status_code == 200
        for user in (operator.user, member.user):
            assert user["id"] in which.text
            form = {"email": "ada@example.com", "password": PASSWORD, "login": user["id"]}
            assert client.post("/dashboard/login", data=form).status_code == 303
            at = client.get("/dashboard/").headers["location"]
            assert at.endswith(user["account_id"] or "/overview")
    gateway.api("POST", "/accounts/a/suspend", {})
    with anonymous(gateway) as client:
        form = {"email": "ada@example.com", "password": PASSWORD, "login": member.user["id"]}
        refused = client.post("/dashboard/login", data=form)
        assert (refused.status_code, "suspended" in refused.text) == (403, True)
        assert log_in(client, "ada@example.com", PASSWORD).status_code == 303


def test_a_login_leads_to_the_page_that_was_asked_for(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    closing(new_user(gateway, "ada@example.com"))
    form = {"email": "ada@example.com", "password": PASSWORD}
    with anonymous(gateway) as client:
        asked = client.get("/dashboard/log?before=7")
        assert client.post(asked.headers["location"], data=form).headers["location"] == (
            "/dashboard/log?before=7"
        )
        for next_page in ("https://evil.example/", "//evil.example", "/v1/models"):
            answer = client.post(f"/dashboard/login?next={quote(next_page)}", data=form)
            assert answer.headers["location"] == "/dashboard/"


def test_of_two_who_use_a_link_at_once_one_is_logged_in(gateway: Gateway) -> None:
    user = gateway.api("POST", "/users", {"email": "ada@example.com", "role": "operator"})
    path = urlsplit(user["link"]).path
    clients = [anonymous(gateway) for _ in range(2)]

    def use(client: httpx2.Client) -> int:
        return client.post(path, data={"password": PASSWORD, "again": PASSWORD}).status_code

    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(use, clients))
    assert sorted(statuses) == [303, 404]
    inside = [client.get("/dashboard/you").status_code for client in clients]
    assert [status == 303 for status in statuses] == [status == 200 for status in inside]
    for client in clients:
        client.close()


def test_who_is_let_in_by_no_link_is_told_why(gateway: Gateway) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    link = gateway.api("POST", "/users", {"email": "ada@example.com", "account": "a"})["link"]
    gateway.api("POST", "/accounts/a/suspend", {})
    with anonymous(gateway) as client:
        form = {"password": PASSWORD, "again": PASSWORD}
        answer = client.post(urlsplit(link).path, data=form)
        assert (answer.status_code, "account is suspended" in answer.text) == (403, True)
        assert not client.cookies


def test_a_change_whose_session_ends_before_it_is_sent_whole(
    gateway: Gateway, closing: Callable[[Login], Login]
) -> None:
    login = closing(new_user(gateway, "ada@example.com"))
    cookie = login.client.cookies["redbtc"]
    form, record = b"do=add&name=mine", b'{"name": "mine"}'
    held = []
    for path, body in (("/dashboard/accounts", form), ("/admin/v1/accounts", record)):
        connection = gateway.connect()
        host = f"127.0.0.1:{gateway.port}"
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nCookie: redbtc="
            f"{cookie}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body[:-1]
        )
        held.append((connection, body[-1:]))
    login.get("/dashboard/you")  # by now both have been let in
    gateway.api("DELETE", f"/users/{login.user['id']}")
    for (connection, last), status in zip(held, (b"303", b"401"), strict=True):
        with connection:
            connection.sendall(last)
            assert connection.recv(12) == b"HTTP/1.1 " + status
    assert gateway.api("GET", "/accounts")["accounts"] == []
