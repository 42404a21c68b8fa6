"""Who may have bodies of requests stored, and who may read them: promises 6 and 7."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import httpx2
import pytest

from tests.helpers.gateway import USUAL, Gateway, MakeGateway
from tests.helpers.logins import Login, new_user
from tests.helpers.request_logs import logged_ids, read_body, set_log, stored

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7]

CANARY = "the canary of a prompt"
ADDRESSES = {"owner": "ada@example.com", "viewer": "vi@example.com", "other": "eve@example.com"}


class Rooms(NamedTuple):
    """An account with an owner and a viewer, and another one with an owner."""

    gateway: Gateway
    key: str
    account: str  # its id
    who: dict[str, Login]

    def ask(self, who: str, method: str, path: str, body: Any = None) -> httpx2.Response:
        """Use the admin API on the public port."""
        client = self.who[who].client
        return client.request(method, f"/admin/v1{path}", json=body)

    def log(self, who: str, **body: Any) -> int:
        """Change the setting; return the status."""
        path = f"/accounts/{self.account}/request-log"
        return self.ask(who, "PATCH", path, body).status_code

    def shown(self) -> Any:
        return self.gateway.api("GET", f"/accounts/{self.account}/request-log")

    def logged_request(self) -> str:
        """Send a request; return its id once its bodies are stored."""
        with self.gateway.client(self.key) as client:
            answer = client.post("/responses", json={"model": "gpt-up", "input": CANARY})
        request_id = answer.headers["x-redbtc-request-id"]
        request, response = stored(self.gateway, request_id)
        assert CANARY.encode() in (request or b"")
        assert response == answer.content
        return request_id


@pytest.fixture
def rooms(gateway: Gateway) -> Iterator[Rooms]:
    key = gateway.new_key("a")
    gateway.new_key("b")
    who = {"operator": new_user(gateway, "op@example.com")}
    for name, account in (("owner", "a"), ("viewer", "a"), ("other", "b")):
        role = "viewer" if name == "viewer" else "owner"
        who[name] = new_user(gateway, ADDRESSES[name], role, account)
    (shown,) = gateway.api("GET", "/accounts/a/keys")["keys"]
    yield Rooms(gateway, key, shown["account_id"], who)
    for login in who.values():
        login.client.close()


def test_only_the_owner_of_an_account_that_has_one_switches_logging_on(rooms: Rooms) -> None:
    gateway = rooms.gateway
    for who, status in (("operator", 403), ("viewer", 403), ("other", 404)):
        assert rooms.log(who, days=7) == status
    with httpx2.Client(**USUAL) as client:
        path = f"{gateway.url}/admin/v1/accounts/{rooms.account}/request-log"
        headers = {"authorization": f"Bearer {rooms.key}"}
        assert client.patch(path, json={"days": 7}, headers=headers).status_code == 401
    done = gateway.cli("account", "log", "a", "--days", "7", check=False)
    assert done.returncode == 1
    page = f"/dashboard/accounts/{rooms.account}/settings"
    assert "has an owner" in done.stderr
    assert page in done.stderr
    assert rooms.shown()["log_days"] is None
    assert rooms.log("owner", days=7) == 200
    shown = rooms.shown()
    assert (shown["log_days"], shown["set_by"]) == (7, "ada@example.com of a")
    assert shown["set_at"]
    # Who may not switch it on may not lengthen it, but may shorten it and switch it off.
    for days, status in ((8, 403), (7, 200), (3, 200), (4, 403)):
        assert rooms.log("operator", days=days) == status, days
    (key,) = gateway.api("GET", "/accounts/a/keys")["keys"]
    assert rooms.log("operator", days=4, key=key["id"]) == 403
    assert rooms.log("operator", days=3, key=key["id"]) == 200
    assert rooms.log("viewer", days=None) == 403
    assert rooms.log("other", days=None) == 404
    assert rooms.shown()["log_days"] == 3
    assert rooms.log("operator", days=None) == 200
    shown = rooms.shown()
    assert (shown["log_days"], shown["keys"], shown["set_by"]) == (None, [], "op@example.com")
    told = rooms.ask("owner", "GET", f"/accounts/{rooms.account}/request-log").json()
    assert told["set_by"] == "an operator"
    assert rooms.log("owner", days=5, key=key["id"]) == 200
    for days, status in ((6, 403), (4, 200)):
        assert rooms.log("operator", days=days, key=key["id"]) == status, days


def test_an_operator_decides_for_an_account_without_an_owner(
    rooms: Rooms,
) -> None:
    gateway = rooms.gateway
    gateway.new_key("c")
    gateway.api("POST", "/users", {"email": "v@example.com", "role": "viewer", "account": "c"})
    assert gateway.cli("account", "log", "c", "--days", "2")["log_days"] == 2
    assert not gateway.cli("account", "log", "c")["has_owner"]
    # The link of a login need not have been followed.
    gateway.api("POST", "/users", {"email": "o@example.com", "role": "owner", "account": "c"})
    assert gateway.cli("account", "log", "c", "--days", "3", check=False).returncode == 1
    assert gateway.cli("account", "log", "c", "--off", "--purge")["erased_requests"] == 0


def test_a_key_is_that_of_the_account(rooms: Rooms) -> None:
    gateway = rooms.gateway
    (own,) = gateway.api("GET", "/accounts/a/keys")["keys"]
    (others,) = gateway.api("GET", "/accounts/b/keys")["keys"]
    for who in ("owner", "operator"):
        for key in (others["id"], "key_0000000000000000"):
            path = f"/accounts/{rooms.account}/request-log"
            refused = rooms.ask(who, "PATCH", path, {"days": None, "key": key})
            assert refused.status_code == 404
            assert refused.json()["error"]["message"] == f"key '{key}' does not exist"
    assert rooms.log("owner", days=5) == 200
    assert rooms.log("owner", days=None, key=own["id"]) == 409  # it would be logged as before
    assert rooms.log("owner", days=5, purge=True) == 409


def test_days_are_limited_by_the_setting(make_gateway: MakeGateway) -> None:
    gateway = make_gateway("[retention]\nrequest_log_days_max = 5").start()
    gateway.new_key("a")
    done = gateway.cli("account", "log", "a", "--days", "6", check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "Error: `days` is 6, but bodies can be kept for 5 days at most "
        "(retention.request_log_days_max)\n",
    )
    assert gateway.cli("account", "log", "a", "--days", "5")["max_days"] == 5
    gateway.configure("[retention]\nrequest_log_days_max = 0")
    gateway.restart()
    done = gateway.cli("account", "log", "a", "--days", "1", check=False)
    assert (done.returncode, "request_log_days_max is 0" in done.stderr) == (1, True)
    key = gateway.new_key("a")
    with gateway.client(key) as client:
        client.post("/responses", json={"model": "gpt-up", "input": CANARY})
    assert logged_ids(gateway) == set()
    assert gateway.cli("account", "log", "a", "--off")["log_days"] is None


def test_who_reads_a_body_and_that_it_is_on_record(rooms: Rooms) -> None:
    gateway = rooms.gateway
    assert rooms.log("owner", days=7) == 200
    request_id = rooms.logged_request()
    changes = gateway.api("GET", "/changes")["changes"]
    path, never = f"/requests/{request_id}", "req_" + "0" * 32
    for who, row, body in (
        ("owner", 200, 200),
        ("operator", 200, 403),
        ("viewer", 200, 403),
        ("other", 404, 404),
    ):
        details = rooms.ask(who, "GET", path)
        assert details.status_code == row, who
        told = details.json()
        assert bool(row == 200 and told["bodies"]) == (who in ("owner", "operator")), who
        for name in ("request", "response"):
            answer = rooms.ask(who, "GET", f"{path}/bodies/{name}")
            assert answer.status_code == body, who
            assert (CANARY in answer.text) == (who == "owner" and name == "request")
    for name, at in ((never, path), (request_id, f"{path}/bodies/request")):
        other = rooms.ask("other", "GET", at.replace(request_id, name))
        assert other.json()["error"]["message"] == f"request '{name}' does not exist"
    assert rooms.ask("owner", "GET", f"{path}/bodies/head").status_code == 404
    with httpx2.Client(**USUAL) as client:
        headers = {"authorization": f"Bearer {rooms.key}"}
        for each in (path, f"{path}/bodies/request"):
            url = f"{gateway.url}/admin/v1{each}"
            assert client.get(url, headers=headers).status_code == 401
            assert client.get(url).status_code == 401
    read = gateway.api("GET", "/changes")["changes"][: -len(changes)]
    assert [
        (each["kind"], each["object_id"], each["account"], each["changed_by"], each["after"])
        for each in read
    ] == [
        ("request_log", request_id, "a", "ada@example.com of a", {"read": "response"}),
        ("request_log", request_id, "a", "ada@example.com of a", {"read": "request"}),
    ]


def test_an_export_of_bodies_is_among_the_readings_that_the_owner_sees(rooms: Rooms) -> None:
    gateway = rooms.gateway
    assert rooms.log("owner", days=7) == 200
    rooms.logged_request()
    gateway.cli("account", "export", "a", "--to", str(gateway.folder / "a.zip"))
    path = f"/accounts/{rooms.account}/request-log"
    newest = rooms.ask("owner", "GET", path).json()["readings"][0]
    assert (newest["by"], newest["request_id"], newest["body"]) == ("an operator", None, None)
    page = rooms.who["owner"].get(f"/dashboard/accounts/{rooms.account}/settings").text
    assert "all, exported" in page
    assert gateway.run("account", "log", "a").returncode == 0


def test_readings_by_a_nameless_user_are_shown(rooms: Rooms) -> None:
    assert rooms.log("owner", days=7) == 200
    request_id = rooms.logged_request()
    transport = httpx2.HTTPTransport(uds=f"{rooms.gateway.database}.sock")
    with httpx2.Client(transport=transport, base_url="http://gateway") as client:
        path = f"/admin/v1/requests/{request_id}/bodies/request"
        assert client.get(path, headers={"redbtc-user": ""}).status_code == 200
    found = rooms.ask("owner", "GET", f"/accounts/{rooms.account}/request-log")
    assert found.json()["readings"][0]["by"] == "an operator"


def test_a_command_reads_a_body_exactly_and_the_owner_is_told(rooms: Rooms) -> None:
    gateway = rooms.gateway
    assert rooms.log("owner", days=7) == 200
    request_id = rooms.logged_request()
    before = len(rooms.shown()["readings"])
    done = gateway.run("usage", "show", request_id, "--request")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["input"] == CANARY
    path = f"/accounts/{rooms.account}/request-log"
    readings = rooms.ask("owner", "GET", path).json()["readings"]
    assert len(readings) == before + 1
    assert (readings[0]["request_id"], readings[0]["body"], readings[0]["by"]) == (
        request_id,
        "request",
        "an operator",
    )
    shown = gateway.run("usage", "show", request_id)
    row = gateway.row(request_id)
    for name, value in row.items():
        if value is not None:
            assert any(
                line.startswith(f"{name} ") and line.endswith(f" {value}")
                for line in shown.stdout.splitlines()
            ), name
    assert "stored until" in shown.stdout
    assert "parts are missing" not in shown.stdout
    assert CANARY not in shown.stdout
    told = gateway.cli("usage", "show", request_id)
    assert told["request"] == row
    assert told["bodies"]["request"]["withheld"] is False
    assert len(rooms.shown()["readings"]) == before + 1  # to see the sizes is no reading
    assert rooms.log("owner", days=None, purge=True) == 200
    for option in ("--request", "--response"):
        done = gateway.run("usage", "show", request_id, option)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: nothing is stored of the re")
    assert "bodies" in gateway.run("usage", "show", request_id).stdout
    done = gateway.run("usage", "show", "req_0")
    assert (done.returncode, done.stderr) == (1, "Error: request 'req_0' does not exist\n")


def test_a_body_that_was_too_long_is_printed_with_a_note(make_gateway: MakeGateway) -> None:
    gateway = make_gateway("[request_log]\nmax_body_bytes = 1024").start()
    key = gateway.new_key("a")
    set_log(gateway, "a", 7)
    content = json.dumps({"model": "gpt-up", "input": "x" * 2000}).encode()
    with gateway.client(key) as client:
        answer = client.post("/responses", content=content)
    request_id = answer.headers["x-redbtc-request-id"]
    assert stored(gateway, request_id) == (content[:1024], answer.content)
    done = gateway.run("usage", "show", request_id, "--request")
    assert (done.returncode, done.stdout.encode()) == (0, content[:1024])
    assert f"the first 1024 of {len(content)} bytes are stored" in done.stderr
    assert (
        "; parts are missing, or it has not ended"
        in gateway.run("usage", "show", request_id).stdout
    )


def test_nothing_is_shown_if_the_reading_can_t_be_recorded(rooms: Rooms) -> None:
    gateway = rooms.gateway
    assert rooms.log("owner", days=7) == 200
    request_id = rooms.logged_request()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("BEGIN IMMEDIATE")  # the ledger can't be written now
        answer = read_body(gateway, request_id, "request")
        assert (answer.status_code, CANARY in answer.text) == (503, False)


def test_fewer_days_hold_for_what_is_stored_but_not_for_keys_of_their_own(rooms: Rooms) -> None:
    gateway = rooms.gateway
    (key,) = gateway.api("GET", "/accounts/a/keys")["keys"]
    assert rooms.log("owner", days=9) == 200
    request_id = rooms.logged_request()

    def days_kept() -> int:
        bodies = gateway.api("GET", f"/requests/{request_id}")["bodies"]
        since, until = (datetime.fromisoformat(bodies[f"{at}_at"]) for at in ("logged", "expires"))
        return (until - since).days

    assert days_kept() == 9
    assert rooms.log("owner", days=12) == 200
    assert days_kept() == 9
    assert rooms.log("owner", days=5) == 200
    assert days_kept() == 5
    assert rooms.log("owner", days=5, key=key["id"]) == 200
    assert rooms.log("owner", days=2) == 200
    assert days_kept() == 5
    assert rooms.log("owner", days=1, key=key["id"]) == 200
    assert days_kept() == 1


def test_no_browser_runs_a_stored_body(rooms: Rooms) -> None:
    assert rooms.log("owner", days=7) == 200
    request_id = rooms.logged_request()
    answer = rooms.ask("owner", "GET", f"/requests/{request_id}/bodies/request")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
