"""What an owner can ask for, and what a terminated account does not get any more."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.helpers.gateway import Gateway, MakeGateway, wait_for_length
from tests.helpers.logins import PASSWORD, Login, anonymous, log_in, new_user
from tests.helpers.webhook import SECRET, receiving

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7]


NewLogin = Callable[..., Login]


@pytest.fixture
def new_login() -> Iterator[NewLogin]:
    """Makes users and logs them in, until the end of the test."""
    with ExitStack() as stack:

        def make(gateway: Gateway, *user: str) -> Login:
            login = new_user(gateway, *user)
            stack.callback(login.client.close)
            return login

        yield make


def message(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["message"])


def test_an_owner_asks_to_close_the_account(make_gateway: MakeGateway, new_login: NewLogin) -> None:
    with receiving() as hook:
        settings = f"[billing]\n{hook.settings()}"
        gateway = make_gateway(settings, HOOK_SECRET=SECRET).start()
        account = gateway.api("POST", "/accounts", {"name": "The <Company>"})["id"]
        owner = new_login(gateway, "ada@example.com", "owner", account)
        operator = new_login(gateway, "op@example.com")
        page = f"/dashboard/accounts/{account}"
        wrong = owner.post(f"{page}/settings", do="close", name="The Company")
        assert (wrong.status_code, "Type the account" in wrong.text) == (400, True)
        assert "asks to be closed" not in operator.get("/dashboard/overview").text
        done = owner.post(f"{page}/settings", do="close", name="The <Company>")
        assert done.status_code == 303
        asked_at = gateway.api("GET", f"/accounts/{account}")["closing_asked_at"]
        assert asked_at
        for path in ("/dashboard/accounts", f"{page}/manage"):
            assert "asks to be closed" in operator.get(path).text
        assert "The &lt;Company&gt;" in operator.get("/dashboard/overview").text
        wait_for_length(hook.posts, 1)
        assert hook.posts[0].content["type"] == "account.closing"
        assert hook.posts[0].content["data"]["account_id"] == account
        path = f"/admin/v1/accounts/{account}/closing"
        again = owner.client.post(path, json={})
        assert again.json()["closing_asked_at"] == asked_at, "the first time is kept"
        assert "status_reason" not in again.json(), "only operators see it"
        assert len(gateway.api("GET", "/webhook")["messages"]) == 1
        assert owner.post(f"{page}/settings", do="keep").status_code == 303
        assert gateway.api("GET", "/overview")["closing"] == []
        changes = gateway.api("GET", "/changes", account=account)["changes"]
        asked = [each for each in changes if "closing_asked_at" in (each["before"] or {})]
        assert [each["changed_by"] for each in asked] == ["ada@example.com of The <Company>"] * 2
        assert asked[1]["after"]["closing_asked_at"] == asked_at


def test_who_may_close_an_account(gateway: Gateway, new_login: NewLogin) -> None:
    for name in ("a", "b"):
        gateway.api("POST", "/accounts", {"name": name})
    viewer = new_login(gateway, "v@example.com", "viewer", "a")
    owner = new_login(gateway, "o@example.com", "owner", "a")
    operator = new_login(gateway, "op@example.com")
    ids = {name: gateway.api("GET", f"/accounts/{name}")["id"] for name in ("a", "b")}
    closing = {name: f"/admin/v1/accounts/{each}/closing" for name, each in ids.items()}
    for login, name, status in (
        (viewer, "a", 403),
        (owner, "b", 404),
        (owner, "a", 200),
        (operator, "b", 200),
    ):
        assert login.client.post(closing[name], json={}).status_code == status
        assert login.client.delete(closing[name]).status_code == status
    for login in (viewer, owner):
        answer = login.client.post(f"/admin/v1/accounts/{ids['a']}/terminate", json={})
        assert answer.status_code == 403
        form = {"do": "terminate", "name": "a"}
        assert login.post(f"/dashboard/accounts/{ids['a']}/manage", **form).status_code == 403
    manage = f"/dashboard/accounts/{ids['b']}/manage"
    assert operator.post(manage, do="terminate", name="a").status_code == 400
    assert gateway.api("GET", "/accounts/b")["status"] == "active"
    done = operator.post(manage, do="terminate", name="b")
    assert "Account terminated. 0 requests in flight stopped." in done.text
    assert gateway.api("GET", "/accounts/b")["status"] == "terminated"


def test_what_a_terminated_account_gets(gateway: Gateway, new_login: NewLogin) -> None:
    """Nothing but statements and payments."""
    gateway.api("POST", "/accounts", {"name": "leaves"})
    owner = new_login(gateway, "ada@example.com", "owner", "leaves")
    added = gateway.api("POST", "/accounts/leaves/keys", {"label": "x"})
    link = gateway.api("POST", "/users", {"email": "eve@example.com", "account": "leaves"})["link"]
    operator = new_login(gateway, "op@example.com")
    preview = gateway.api("POST", "/accounts/leaves/terminate", {"preview": True})
    assert (preview["done"], preview["keys"]) == (False, 1)
    assert owner.client.get("/admin/v1/accounts/leaves").status_code == 200
    done = gateway.api("POST", "/accounts/leaves/terminate", {})
    assert (done["keys"], done["erased_at"]) == (1, None)
    assert done["erase_at"] > done["terminated_at"]
    assert owner.client.get("/admin/v1/accounts/leaves").status_code == 401
    with anonymous(gateway) as client:
        assert log_in(client, "ada@example.com", PASSWORD).status_code != 303
        passwords = {"password": PASSWORD, "again": PASSWORD}
        assert client.post(urlsplit(link).path, data=passwords).status_code == 404
    account = f"/admin/v1/accounts/{done['account_id']}"
    for method, path, body in (
        ("POST", f"{account}/keys", {"label": "y"}),
        ("POST", f"/admin/v1/keys/{added['id']}/rotate", {}),
        ("POST", "/admin/v1/users", {"email": "x@example.com", "account": "leaves"}),
        ("POST", "/admin/v1/users/ada@example.com/reset", {}),
        ("PATCH", account, {"concurrency": 5}),
        ("POST", f"{account}/suspend", {}),
        ("POST", f"{account}/resume", {}),
        ("POST", f"{account}/throttle", {"factor": "0.5"}),
        ("POST", f"{account}/closing", {}),
        ("DELETE", f"{account}/closing", None),
        ("POST", f"{account}/terminate", {}),
    ):
        answer = operator.client.request(method, path, json=body)
        assert answer.status_code == 409, (path, answer.text)
        assert "terminated" in message(answer) or "expired" in message(answer), path
    paid = operator.client.post(f"{account}/payments", json={"amount": "5"})
    assert paid.status_code == 201
    month = gateway.api("GET", f"/accounts/leaves/statements/{paid.json()['month']}")
    assert len(month["payments"]) == 1
    for page in ("", "/keys", "/usage", "/billing", "/members", "/notices", "/settings", "/manage"):
        operator.get(f"/dashboard/accounts/{done['account_id']}{page}")
    (listed,) = gateway.api("GET", "/accounts")["accounts"]
    assert (listed["status"], listed["erase_at"]) == ("terminated", done["erase_at"])


def test_the_command_asks_first(make_gateway: MakeGateway) -> None:
    gateway = make_gateway("[retention]\nterminated_account_days = 0")
    gateway.cli("account", "add", "leaves")
    command = gateway.command("account", "terminate", "leaves")
    asked = subprocess.run(command, input="n\n", capture_output=True, text=True, check=False)
    assert asked.returncode == 1
    assert "account export acct_" in asked.stderr
    assert "can't be undone" in asked.stderr
    assert gateway.cli("account", "show", "leaves")["status"] == "active"
    done = gateway.cli("account", "terminate", "leaves", "--yes")
    assert done["erased_at"], "0 days are at once"
    assert gateway.cli("account", "show", done["account_id"])["name"] == done["account_id"]
    gateway.cli("account", "add", "leaves")


def test_the_time_of_an_erasure_moves_with_the_ledger(gateway: Gateway) -> None:
    """`db set-time` moves the termination of an account, and its erasure by as much."""
    gateway.api("POST", "/accounts", {"name": "leaves"})
    done = gateway.api("POST", "/accounts/leaves/terminate", {})
    gateway.api("POST", "/db/set-time", {"time": "1d"})
    shown = gateway.api("GET", "/accounts/leaves")
    assert shown["terminated_at"] < done["terminated_at"]
    days = {each["erase_at"][:10] for each in (shown, done)}
    assert len(days) == 2
