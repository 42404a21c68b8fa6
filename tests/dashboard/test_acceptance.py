"""Owners accept the newest documents, on record, before they go on using the dashboard."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.dashboard.pages import PAGES, cells
from tests.helpers.documents import days_ahead, reload, write_document
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.logins import PASSWORD, Login, anonymous, log_in, new_user

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7]

SITE = '[site]\nterms = "terms.md"\nprivacy = "privacy.md"\n'
ACCEPT = "/dashboard/accept"


@pytest.fixture
def site(make_gateway: MakeGateway) -> Gateway:
    """A running gateway with documents and two accounts."""
    gateway = make_gateway(f"[server]\n{SITE}")
    write_document(gateway, "1")
    write_document(gateway, "2026-12", name="privacy")
    gateway.start()
    for name in ("a", "b"):
        gateway.api("POST", "/accounts", {"name": name})
    return gateway


def leads_to_acceptance(login: Login, path: str) -> bool:
    answer = login.client.get(path)
    return answer.status_code == 303 and answer.headers["location"].startswith(ACCEPT)


def acceptances(gateway: Gateway, account: str = "a") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.api("GET", f"/accounts/{account}/acceptances")[
        "acceptances"
    ]
    return found


def test_an_owner_sees_nothing_else_until_the_documents_are_accepted(
    site: Gateway, closing: Callable[[Login], Login]
) -> None:
    owner = closing(new_user(site, "ada@example.com", "owner", "a"))
    account = f"/dashboard/accounts/{owner.user['account_id']}"
    others = [account + each for each in PAGES if each != "/settings"]
    for page in [*others, "/dashboard/", "/dashboard/you"]:
        assert leads_to_acceptance(owner, page), page
    assert leads_to_acceptance(owner, f"{account}/usage.csv")
    owner.get(f"{account}/settings")
    there = owner.client.get(f"{account}/keys?page=1").headers["location"]
    assert there == f"{ACCEPT}?next=%2Fdashboard%2Faccounts%2F{account[20:]}%2Fkeys%3Fpage%3D1"
    text = owner.get(there).text
    assert '<a href="/terms?version=1">Terms of service, version 1</a>' in text
    assert '<a href="/privacy?version=2026-12">Privacy policy, version 2026-12</a>' in text
    assert owner.post(f"{account}/keys", do="add").status_code == 403
    assert site.api("GET", "/accounts/a/keys")["keys"] == []
    accepted = owner.post(there, terms="1", privacy="2026-12")
    assert (accepted.status_code, accepted.headers["location"]) == (303, f"{account}/keys?page=1")
    owner.get(f"{account}/keys")
    assert owner.post(f"{account}/keys", do="add").status_code == 200
    assert owner.client.get(ACCEPT).headers["location"] == "/dashboard/"
    evil = owner.client.get(f"{ACCEPT}?next=https://evil.example/")
    assert evil.headers["location"] == "/dashboard/"
    rows = acceptances(site)
    assert {(each["document"], each["version"]) for each in rows} == {
        ("terms", "1"),
        ("privacy", "2026-12"),
    }
    assert {each["user"] for each in rows} == {"ada@example.com"}
    assert acceptances(site, "b") == []


def test_an_acceptance_is_on_record_once(site: Gateway, closing: Callable[[Login], Login]) -> None:
    owner = closing(new_user(site, "ada@example.com", "owner", "a"))
    for _ in range(3):
        owner.post(ACCEPT, terms="1", privacy="2026-12")
    logged = site.api("GET", "/changes", account="a")["changes"]
    logged = [each for each in logged if each["kind"] == "terms"]
    assert sorted(each["object_id"] for each in logged) == ["privacy", "terms"]
    assert {each["changed_by"] for each in logged} == {"ada@example.com of a"}
    assert {each["after"]["user"] for each in logged} == {owner.user["id"]}
    assert sorted(each["after"]["accepted"] for each in logged) == ["1", "2026-12"]
    site.api("DELETE", f"/users/{owner.user['id']}")
    assert [each["user"] for each in acceptances(site)] == [None, None], "it outlives the login"
    counts = {each["version"]: each["owners"] for each in documents(site)}
    assert counts == {"1": 1, "2026-12": 1}


def documents(gateway: Gateway) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.api("GET", "/documents")["documents"]
    return found


def test_only_owners_accept_and_each_for_themselves(
    site: Gateway, closing: Callable[[Login], Login]
) -> None:
    owner = closing(new_user(site, "ada@example.com", "owner", "a"))
    second = closing(new_user(site, "grace@example.com", "owner", "a"))
    viewer = closing(new_user(site, "viewer@example.com", "viewer", "a"))
    operator = closing(new_user(site, "op@example.com"))
    path = f"/dashboard/accounts/{owner.user['account_id']}"
    for login in (viewer, operator):
        login.get(path)
        assert login.client.get(ACCEPT).status_code == 303
        answer = login.post(ACCEPT, terms="1")
        api = login.client.post("/admin/v1/login/acceptances", json={"terms": "1"})
        assert (answer.status_code, api.status_code) == (303, 403)
    assert acceptances(site) == []
    owner.post(ACCEPT, terms="1", privacy="2026-12")
    assert not leads_to_acceptance(owner, path)
    assert leads_to_acceptance(second, path)
    with anonymous(site) as client:  # the same login in another browser
        log_in(client, "ada@example.com", PASSWORD)
        assert client.get(path).status_code == 200
        assert log_in(client, "grace@example.com", PASSWORD).status_code == 303
        assert client.get(path).headers["location"].startswith(ACCEPT)
        assert client.post("/dashboard/logout").headers["location"] == "/dashboard/login"
    assert second.client.get(f"/admin/v1/accounts/{path[20:]}/acceptances").status_code == 403
    own = owner.client.get(f"/admin/v1/accounts/{path[20:]}/acceptances").json()
    assert len(own["acceptances"]) == 2
    foreign = site.api("GET", "/accounts/b")["id"]
    assert owner.client.get(f"/admin/v1/accounts/{foreign}/acceptances").status_code == 404
    viewed = viewer.client.get(f"/admin/v1/accounts/{path[20:]}/acceptances")
    assert viewed.status_code == 403


def test_the_admin_api_asks_for_acceptance_too_and_keys_keep_working(
    site: Gateway, closing: Callable[[Login], Login]
) -> None:
    owner = closing(new_user(site, "ada@example.com", "owner", "a"))
    account = f"/admin/v1/accounts/{owner.user['account_id']}"
    for answer in (
        owner.client.get(account),
        owner.client.post(f"{account}/keys", json={}),
        owner.client.get("/admin/v1/usage"),
    ):
        assert answer.status_code == 403
        assert f"{site.url}/dashboard/accept" in answer.json()["error"]["message"]
    with site.client(site.new_key("a")) as client:
        assert client.post("/responses", json={"model": "m", "input": "Hi"}).status_code == 200
        assert client.get(f"{site.url}/admin/v1/me").status_code == 200
    acceptance = "/admin/v1/login/acceptances"
    missing = owner.client.get(acceptance).json()["documents"]
    assert missing[0]["url"] == f"{site.url}/terms?version=1"
    assert owner.client.post(acceptance, json={}).status_code == 409
    assert owner.client.post(acceptance, json={"cookies": "1"}).status_code == 400
    left = owner.client.post(acceptance, json={"terms": "1"}).json()["documents"]
    assert [each["document"] for each in left] == ["privacy"]
    assert owner.client.get(account).status_code == 403
    there = {"origin": "https://evil.example"}
    body = {"privacy": "2026-12"}
    assert owner.client.post(acceptance, json=body, headers=there).status_code == 403
    assert owner.client.post(ACCEPT, data=body, headers=there).status_code == 403
    assert len(acceptances(site)) == 1
    assert owner.client.post(acceptance, json=body).json()["documents"] == []
    assert owner.client.get(account).status_code == 200


def test_a_coming_version_is_accepted_and_only_the_one_that_was_shown(
    site: Gateway, closing: Callable[[Login], Login]
) -> None:
    owner = closing(new_user(site, "ada@example.com", "owner", "a"))
    owner.post(ACCEPT, terms="1", privacy="2026-12")
    path = f"/dashboard/accounts/{owner.user['account_id']}"
    write_document(site, "2", days_ahead(15), "Be kinder.")
    reload(site)
    assert leads_to_acceptance(owner, path)
    shown = owner.get(ACCEPT).text
    assert re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', shown) == [("terms", "2")]
    write_document(site, "3", days_ahead(16), "Be kindest.")
    reload(site)
    answer = owner.post(ACCEPT, terms="2")
    assert answer.status_code == 409
    assert "not the newest version any more" in answer.text
    assert 'name="terms" value="3"' in answer.text
    assert leads_to_acceptance(owner, path)
    assert owner.post(ACCEPT, terms="4").status_code == 409
    assert owner.post(ACCEPT).status_code == 409
    owner.post(ACCEPT, terms="3")
    owner.get(path)
    assert [each["version"] for each in acceptances(site)] == ["2026-12", "1", "3"]
    site.configure()
    reload(site, '"reloaded"')
    second = closing(new_user(site, "grace@example.com", "owner", "a"))
    second.get(path)  # there is nothing to accept any more


def test_members_and_operators_see_who_has_accepted(
    site: Gateway, closing: Callable[[Login], Login]
) -> None:
    owner = closing(new_user(site, "ada@example.com", "owner", "a"))
    operator = closing(new_user(site, "op@example.com"))
    path = f"/dashboard/accounts/{owner.user['account_id']}/members"
    assert "Accepted documents" not in operator.get(path).text
    owner.post(ACCEPT, terms="1", privacy="2026-12")
    for login in (owner, operator):
        rows = cells(login.get(path).text, "Accepted documents")
        assert [row[:3] for row in rows] == [
            ["Privacy policy", "2026-12", "ada@example.com"],
            ["Terms of service", "1", "ada@example.com"],
        ]
    assert "terms" in operator.get("/dashboard/log").text
