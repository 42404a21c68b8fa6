"""The admin API as its own description tells it, and who is shown what. schemathesis sends what the
description allows and what it doesn't; the rest is what no description can say."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import sqlite3
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple, get_type_hints

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, GenerationMode

from redbtc.admin.actors import RANKS, Actor
from redbtc.admin.api import OPERATIONS
from redbtc.admin.http import MAX_FIELDS
from redbtc.admin.inputs import Nothing
from redbtc.admin.openapi import openapi
from redbtc.admin.operations import JSON_ANSWER, PREFIX, Operation, variables_of
from tests.helpers.gateway import NO_TLS, PATIENCE_SECONDS, USUAL, Gateway
from tests.helpers.speed import Stalls
from tests.helpers.upstream import Upstream

pytestmark = pytest.mark.promise_7

PASSWORD = "correct horse battery staple 7"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for all of schemathesis' requests."""
    with Upstream() as upstream:
        gateway = Gateway(tmp_path_factory.mktemp("gateway"), upstream.url).start()
        yield gateway
        gateway.close()


def log_in(gateway: Gateway, link: str) -> dict[str, str]:
    """Sets a password with a user's link; headers of a browser that is logged in from then on."""
    origin = {"origin": gateway.url}
    form = {"password": PASSWORD, "again": PASSWORD}
    url = f"{gateway.url}/dashboard/link/{link.rsplit('/', 1)[1]}"
    with httpx2.Client(**USUAL) as client:
        answer = client.post(url, data=form, headers=origin)
        assert answer.status_code == 303, answer.text
        return {"Cookie": f"redbtc={answer.cookies['redbtc']}", "Origin": gateway.url}


def new_user(gateway: Gateway, email: str, role: str, account: str | None = None) -> dict[str, str]:
    """Headers of a new user who is logged in."""
    body = {"email": email, "role": role, **({"account": account} if account else {})}
    return log_in(gateway, gateway.api("POST", "/users", body)["link"])


# ── As it is described ───────────────────────────────────────────────────────────────────────────

# Who asks is always logged in, or shows a key; the check `ignored_auth` asks again without.
CONFIG = schemathesis.Config.from_dict({"generation": {"with-security-parameters": False}})
DESCRIBED = schemathesis.openapi.from_dict(openapi(secure=False), config=CONFIG)
FEW = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


NUMBERS = itertools.count()


class Asking(NamedTuple):
    """Who asks: as an operator, and with a key."""

    session: requests.Session
    cookie: dict[str, str]
    bearer: dict[str, str]


@pytest.fixture(scope="module")
def asking(running: Gateway) -> Iterator[Asking]:
    key = running.new_key("of the key that asks")
    cookie = new_user(running, "op@example.com", "operator")
    with requests.Session() as session:
        session.trust_env = False
        yield Asking(session, cookie, {"Authorization": f"Bearer {key}"})


@pytest.fixture
def ids(running: Gateway) -> dict[str, str]:
    """Of what there is: new for each operation, and never the one's who asks. If his password were
    changed (it is never guessed), his session ended (it has a chance's id), he himself removed or
    reset, or his key revoked, all that is asked after that would be refused."""
    name = f"account {next(NUMBERS)}"
    running.api("POST", "/accounts", {"name": name})
    key = running.api("POST", f"/accounts/{name}/keys")
    user = running.api("POST", "/users", {"email": "ada@example.com", "account": name})
    notice = running.api("POST", "/notices", {"kind": "incident", "text": "slow"})
    with running.client(key["key"]) as client:
        answer = client.post("/responses", json={"model": "m", "input": "Hi"})
    return {
        "account": key["account_id"],
        "key": key["id"],
        "notice": notice["id"],
        "request": answer.headers["x-redbtc-request-id"],
        "body": "request",
        "upstream": "test",
        "user": user["id"],
        "session": "ses_0123456789abcdef",
        "month": key["created_at"][:7],
        "part": "account",
    }


@DESCRIBED.parametrize()
@FEW
def test_every_operation_keeps_its_description(
    case: Case[Any], running: Gateway, asking: Asking, ids: dict[str, str]
) -> None:
    assert case.meta is not None
    if case.meta.generation.mode == GenerationMode.POSITIVE:
        # Chance finds no id. Three in four times it is one that there is.
        known = {name for name, value in case.path_parameters.items() if len(str(value)) % 4}
        case.path_parameters.update({name: ids[name] for name in known})
    headers = asking.bearer if case.path.startswith(f"{PREFIX}/me") else asking.cookie
    case.call_and_validate(running.url, asking.session, headers)


OPERATION_IDS = """
    account_limits account_notices account_notices_of_key account_payments
    account_payments_of_key account_prices account_prices_of_key add_account add_key add_notice
    add_payment add_prices add_user balance change_password check_database end_session limits
    list_accounts list_changes list_keys list_months list_notices list_payments list_prices
    list_sessions list_users me overview remove_user requests requests_of_key reset_user
    resume_account revoke_key rotate_key set_account set_time show_account statement
    statement_of_key suspend_account throttle_account usage usage_of_key which_price
    withdraw_notice"""
SCHEMAS = """
    Account AccountChange AccountInList AccountList AccountWithMoney AccountsQuery Balance
    Change ChangeList ChangesQuery Check Correction DatabaseSize Done Error FollowingPrice Group
    KeyAdded KeyInList KeyList KeyRevoked Lately MeShown Month MonthList MostSpent NewAccount
    NewKey NewNotice NewPassword NewPayment NewPrice NewPrices NewTime NewUser NotApplied
    Nothing Notice NoticeList NoticeWithdrawn OtherPrice Overview OverviewQuery Payment
    PaymentAdded PaymentList PriceList PriceShown PriceSlot PricesAdded PublishedNotice
    Quantiles RatesOfEarlierPrice Refused RequestReport RequestShown RequestsQuery Revocation
    Rotation SessionList SessionShown SpendingOverview Statement StatementQuery StatementTotals
    Sums SumsQuery Suspension Throttle TimeSet TrafficOfDay UpstreamAtWork UpstreamLately
    UsageReport UserAdded UserList UserShown UsersQuery WhichPrice WhichPriceQuery WhichUser"""


def test_generated_clients_find_the_names_that_they_know() -> None:
    described = openapi(secure=False)
    methods = [method for path in described["paths"].values() for method in path.values()]
    assert {*OPERATION_IDS.split()} <= {method["operationId"] for method in methods}
    assert {*SCHEMAS.split()} <= described["components"]["schemas"].keys()


def test_the_description_served_is_that_of_how_it_is_reached(running: Gateway) -> None:
    answer = running.get(f"{PREFIX}/openapi.json")
    assert answer.json() == openapi(secure=False)
    schemes = openapi(secure=True)["components"]["securitySchemes"]
    assert schemes["session"]["name"] == "__Host-redbtc"


def test_the_description_is_made_once(running: Gateway) -> None:
    """Anybody may ask for it, on as many connections as he likes."""
    head = f"GET {PREFIX}/openapi.json HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    running.get(f"{PREFIX}/openapi.json")
    with contextlib.ExitStack() as stack, Stalls(running.port) as stalls:
        socks = [stack.enter_context(running.connect()) for _ in range(150)]
        for sock in socks:
            sock.sendall(head.encode())
        for sock in socks:
            with sock.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
                answer.read()
    assert stalls.longest < 200, "to make one takes 5 to 10 units"


@pytest.mark.parametrize("path", ["/openapi.json", "/accounts", "/nothing"])
def test_no_browser_takes_an_answer_for_a_page(running: Gateway, path: str) -> None:
    headers = running.get(f"{PREFIX}{path}").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"


# ── What is sent ─────────────────────────────────────────────────────────────────────────────────


def told(answer: httpx2.Response) -> str:
    """An error's message."""
    return str(answer.json()["error"]["message"])


@pytest.fixture(scope="module")
def local(running: Gateway) -> Iterator[httpx2.Client]:
    """Over the socket, where everybody is an operator."""
    with socket_of(running) as client:
        yield client


def socket_of(gateway: Gateway) -> httpx2.Client:
    transport = httpx2.HTTPTransport(verify=NO_TLS, uds=f"{gateway.database}.sock")
    return httpx2.Client(
        transport=transport, base_url=f"http://gateway{PREFIX}", timeout=PATIENCE_SECONDS
    )


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/prices", {"prices": [{"model": "m", "colour": "red"}]}, "$.prices[0].colour"),
        ("/prices", {"prices": [{"model": "m"}, {"input": "1"}]}, "$.prices[1].model"),
        ("/prices", {"prices": [{"model": "m", "input": 1}]}, "$.prices[0].input"),
        ("/accounts", {"name": "a", "colour": "red"}, "$.colour"),
        ("/accounts", {}, "$.name"),
        ("/accounts", {"name": "a line's end\n"}, "$.name"),
        ("/users", {"email": "a@example.com", "role": "king"}, "$.role"),
        ("/db/check", {"colour": "red"}, "$.colour"),
        ("/accounts/other/keys", {"models": []}, "$.models"),
        ("/accounts/other/keys", {"models": ""}, "$.models"),
        ("/accounts/other/keys", {"label": "a\x00b"}, "$.label"),
        ("/accounts/other/suspend", {"reason": "two\nlines"}, "$.reason"),
        ("/accounts", {"name": "a\u202eb"}, "$.name"),
        ("/notices", {"kind": "incident", "text": "a\x1bb"}, "$.text"),
    ],
)
def test_an_error_names_the_place(
    local: httpx2.Client, path: str, body: dict[str, Any], place: str
) -> None:
    answer = local.post(path, json=body)
    assert answer.status_code == 400
    assert f"`{place}`" in told(answer)


@pytest.mark.parametrize(
    "body", [b"\xff", b'{"name": "\xff"}', b"[" * 5000, b"nul", b'{"name": "\\ud800"}', b"[]"]
)
def test_what_is_no_json_object_is_refused(local: httpx2.Client, body: bytes) -> None:
    assert local.post("/accounts", content=body).status_code == 400


def test_a_body_that_is_too_large_is_refused(running: Gateway, asking: Asking) -> None:
    url, before = f"{running.url}{PREFIX}/accounts", running.rss()
    with contextlib.suppress(requests.ConnectionError):  # refused while it was sent
        parts = (b" " * (1 << 20) for _ in range(100))
        answer = asking.session.post(url, data=parts, headers=asking.cookie)
        assert answer.status_code == 413
    assert running.rss() - before < 50 << 20


def test_half_a_body_does_no_harm(running: Gateway, asking: Asking) -> None:
    head = f"POST {PREFIX}/accounts HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in asking.cookie.items())
    running.raw(f'{head}Content-Length: 99\r\n\r\n{{"name": "half'.encode(), read_seconds=0.2)
    names = [account["name"] for account in running.api("GET", "/accounts")["accounts"]]
    assert "half" not in names
    assert "Traceback" not in running.log()


def test_no_account_is_named_as_anothers_id(local: httpx2.Client, ids: dict[str, str]) -> None:
    answer = local.post("/accounts", json={"name": ids["account"]})
    assert answer.status_code == 409
    assert local.get(f"/accounts/{ids['account']}").json()["id"] == ids["account"]


def test_an_unknown_or_a_doubled_query_parameter_is_refused(
    local: httpx2.Client, ids: dict[str, str]
) -> None:
    for operation in OPERATIONS:
        path = operation.paths[0].format(**ids)
        if path.startswith("/me"):
            continue
        answer = local.request(operation.method, f"{path}?colour=red")
        assert (answer.status_code, "`$.colour`" in told(answer)) == (400, True), operation.name
        for name in operation.query.__struct_fields__:
            answer = local.request(operation.method, f"{path}?{name}=1&{name}=1")
            assert answer.status_code == 400, (operation.name, name)


def test_a_query_with_too_many_fields_is_refused(local: httpx2.Client) -> None:
    answer = local.get("/usage?" + "&".join(f"a{number}" for number in range(MAX_FIELDS + 1)))
    assert (answer.status_code, "at most 100 are allowed" in told(answer)) == (400, True)


def test_the_table_of_operations_matches_the_handlers() -> None:
    for operation in OPERATIONS:
        _, actor, *parameters = inspect.signature(operation.handler).parameters.values()
        hints = get_type_hints(operation.handler)
        assert hints[actor.name] is Actor, operation.name
        if operation.input is not Nothing:
            assert hints[parameters.pop(0).name] is operation.input, operation.name
        assert hints["return"] == operation.answer, operation.name
        known = {each.name for each in parameters}
        needed = {each.name for each in parameters if each.default is each.empty}
        assert set(variables_of(operation.path)) == known or operation.key_path, operation.name
        for path in operation.paths:
            assert needed <= set(variables_of(path)) <= known, operation.name


# ── Who may ──────────────────────────────────────────────────────────────────────────────────────

NEVER = {
    "account": "acct_0000000000000000",
    "key": "key_0000000000000000",
    "user": "usr_0000000000000000",
    "session": "ses_0000000000000000",
    "notice": "ntc_0000000000000000",
    "request": "req_00000000000000000000000000000000",
    "upstream": "never/KEY",
    "part": "never",
}
# Of those that need one; the others do with {}.
BODIES = {
    "add_account": {"name": "new"},
    "throttle_account": {"factor": "0.5"},
    "add_payment": {"amount": "5", "reference": "r"},
    "add_prices": {"prices": [{"model": "m", "input": "1"}], "without_notice": "new"},
    "add_notice": {"kind": "incident", "text": "it is slow"},
    "add_user": {"email": "new@example.com"},
    "change_password": {"old_password": "wrong", "new_password": "wrong"},
    "set_request_log": {"days": None},
}
OTHERS = "somebody else"
REASON = "what only operators know"
HIDDEN = {"added_by", "status_reason", "delivered_at", "withdrawn_at", "changed_by"}


class House(NamedTuple):
    """Two accounts of a gateway, ids of what each has, and headers of those who may log in."""

    gateway: Gateway
    key: str
    own: dict[str, str]
    others: dict[str, str]
    who: dict[str, dict[str, str]]
    shared: str  # an address that has logins in two other accounts

    def ask(
        self, who: str, method: str, path: str, body: Any = None, **query: str
    ) -> httpx2.Response:
        """On the public port."""
        url, shown = f"{self.gateway.url}{PREFIX}{path}", self.who[who]
        with httpx2.Client(**USUAL) as client:
            return client.request(method, url, json=body, params=query, headers=shown)

    def last_change(self) -> int:
        """Its id."""
        return int(self.gateway.api("GET", "/changes", limit=1)["changes"][0]["id"])


def furnished(gateway: Gateway, account: str) -> tuple[str, dict[str, str]]:
    """A key of a new account, and ids of what else it has: a request, a payment, a member."""
    key = gateway.new_key(account)
    (shown,) = gateway.api("GET", f"/accounts/{account}/keys")["keys"]
    with gateway.client(key) as client:
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/chat/completions", json=chat).status_code == 200
    payment = {"amount": "-1", "reason": f"of {account}", "reference": account}
    gateway.api("POST", f"/accounts/{account}/payments", payment)
    email = f"{account.replace(' ', '-')}@example.com"
    user = gateway.api("POST", "/users", {"email": email, "role": "owner", "account": account})
    session = log_in(gateway, user["link"])
    row = gateway.rows(account=account)[0]
    url = f"{gateway.url}{PREFIX}/login/sessions"
    (seen,) = httpx2.get(url, headers=session, **USUAL).json()["sessions"]
    return key, {
        "account": shown["account_id"],
        "name": account,
        "key": shown["id"],
        "user": user["id"],
        "email": email,
        "session": seen["id"],
        "request": row["request_id"],
        "month": shown["created_at"][:7],
        **session,
    }


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """For those who only look, and who change what is theirs alone."""
    with Upstream() as upstream:
        gateway = Gateway(tmp_path_factory.mktemp("house"), upstream.url).start()
        yield built(gateway)
        gateway.close()


def built(gateway: Gateway) -> House:
    """Two accounts, and a third that shares an address with the second."""
    prices = {"prices": [{"model": "m", "input": "1", "output": "1"}], "without_notice": REASON}
    gateway.api("POST", "/prices", prices)
    key, own = furnished(gateway, "first")
    _, others = furnished(gateway, OTHERS)
    gateway.api("POST", "/accounts", {"name": f"{OTHERS} again"})
    shared = "shared@example.com"
    for account in (OTHERS, f"{OTHERS} again"):
        gateway.api("POST", "/users", {"email": shared, "account": account})
    notice = gateway.api("POST", "/notices", {"kind": "incident", "text": "it is slow"})
    for each in (own, others):
        each |= {"notice": notice["id"], "upstream": "test"}
        each |= {"part": "statements", "body": "request"}
    gateway.api("POST", "/accounts/first/suspend", {"reason": REASON})
    gateway.api("POST", "/accounts/first/resume")
    who = {
        "key": {"Authorization": f"Bearer {key}"},
        "viewer": new_user(gateway, "viewer@example.com", "viewer", "first"),
        "owner": new_user(gateway, "owner@example.com", "owner", "first"),
        "operator": new_user(gateway, "op@example.com", "operator"),
    }
    return House(gateway, key, own, others, who, shared)


def paths_of(operation: Operation) -> Iterator[str]:
    """Those for who is logged in."""
    return (path for path in operation.paths if not path.startswith("/me"))


def without(ids: dict[str, str], answer: httpx2.Response) -> tuple[int, str]:
    """Status and text, less the ids that were asked for."""
    text = answer.text
    for name, each in ids.items():
        text = text if name == "body" else text.replace(each, "…")
    return answer.status_code, text


def test_each_role_may_do_what_is_its_own(house: House) -> None:
    for operation in OPERATIONS:
        body = BODIES.get(operation.name, {}) if operation.method in ("POST", "PATCH") else None
        for path, role in itertools.product(paths_of(operation), ("viewer", "owner")):
            before = house.last_change()
            allowed = RANKS[role] >= RANKS[operation.min_rank]
            answers = {
                name: house.ask(role, operation.method, path.format(**{**house.own, **ids}), body)
                for name, ids in (("others", house.others), ("never", NEVER))
            }
            if not allowed:
                answers["own"] = house.ask(role, operation.method, path.format(**house.own), body)
                assert {each.status_code for each in answers.values()} == {403}, operation.name
                assert len({each.text for each in answers.values()}) == 1
            elif "{" in path:
                others = without(house.others, answers["others"])
                assert others == without(NEVER, answers["never"]), operation.name
                assert others[0] == 404
            if "{" in path or not allowed:
                assert house.last_change() == before, operation.name
    answer = house.gateway.get(f"{PREFIX}/login/sessions", headers=session_of(house.others))
    assert answer.status_code == 200  # nobody else has ended it


def session_of(ids: dict[str, str]) -> dict[str, str]:
    """Of the member of an account."""
    return {"Cookie": ids["Cookie"], "Origin": ids["Origin"]}


@pytest.mark.parametrize("role", ["viewer", "owner"])
def test_a_filter_tells_nothing_of_others(house: House, role: str) -> None:
    never = {"account": "nobody", "key": NEVER["key"], "before": "req_0"}
    for name, other in (
        ("account", house.others["account"]),
        ("account", OTHERS),
        ("key", house.others["key"]),
        ("before", house.others["request"]),
    ):
        for path in ("/requests", "/usage") if name != "before" else ("/requests",):
            found = house.ask(role, "GET", path, **{name: other})
            none = house.ask(role, "GET", path, **{name: never[name]})
            assert found.status_code == none.status_code == 404
            assert told(found).replace(other, "…") == told(none).replace(never[name], "…")


def test_an_owner_learns_of_no_other_accounts_users(house: House) -> None:
    for method, path in (("DELETE", "/users/{}"), ("POST", "/users/{}/reset")):
        for query in ({}, {"account": OTHERS}, {"account": "nobody"}, {"operator": "true"}):
            none = house.ask("owner", method, path.format("nobody@example.com"), **query)
            assert none.status_code == 404
            for name in (house.shared, house.others["email"], "op@example.com"):
                answer = house.ask("owner", method, path.format(name), **query)
                assert answer.status_code == 404
                assert told(answer).replace(name, "…") == told(none).replace(
                    "nobody@example.com", "…"
                )
    for account in (OTHERS, "nobody"):
        body = {"email": "new@example.com", "account": account}
        answer = house.ask("owner", "POST", "/users", body)
        assert (answer.status_code, told(answer)) == (404, f"account {account!r} does not exist")
    body = {"email": "new@example.com", "role": "operator"}
    assert house.ask("owner", "POST", "/users", body).status_code == 403


def test_a_member_may_have_the_address_of_another_accounts(house: House) -> None:
    body = {"email": house.shared, "role": "viewer"}
    assert house.ask("owner", "POST", "/users", body).status_code == 201
    assert house.ask("owner", "POST", f"/users/{house.shared}/reset").status_code == 201
    assert house.ask("owner", "DELETE", f"/users/{house.shared}").status_code == 200
    left = [user["account"] for user in house.gateway.api("GET", "/users")["users"]]
    assert {OTHERS, f"{OTHERS} again"} <= set(left)


def members(found: Any) -> Iterator[str]:
    """The names of all members of a JSON value."""
    if isinstance(found, dict):
        yield from found
    for each in (
        found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    ):
        yield from members(each)


@pytest.mark.parametrize("role", ["key", "viewer", "owner", "operator"])
def test_members_see_nothing_of_operators_and_of_others(house: House, role: str) -> None:
    seen: set[str] = set()
    text = ""
    for operation in OPERATIONS:
        if operation.method != "GET" or RANKS[role] < RANKS[operation.min_rank]:
            continue
        if operation.name == "read_stored_body":  # nothing is stored here
            continue
        for path in operation.paths:
            if path.startswith("/me") != (role == "key"):
                continue
            query = {"model": "m"} if path == "/prices/which" else {}
            answer = house.ask(role, "GET", path.format(**house.own), **query)
            assert answer.status_code == 200, (path, answer.text)
            if operation.media_type == JSON_ANSWER:
                seen |= set(members(answer.json()))
                text += answer.text
                continue
            with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
                text += "".join(archive.read(name).decode() for name in archive.namelist())
    if role == "operator":  # so that there is something to be hidden
        assert OTHERS in text
        assert REASON in text
        assert seen >= HIDDEN
    else:
        assert OTHERS not in text
        assert REASON not in text
        assert "op@example.com" not in text
        assert not seen & HIDDEN


def test_an_owners_changes_answer_nothing_that_is_hidden(house: House) -> None:
    added = house.ask("owner", "POST", f"/accounts/{house.own['account']}/keys", {})
    key = added.json()["id"]
    answers = [
        added,
        house.ask("owner", "POST", f"/keys/{key}/rotate", {}),
        house.ask("owner", "POST", f"/keys/{key}/compromised", {}),
        house.ask("owner", "POST", f"/keys/{key}/revoke", {}),
        house.ask("owner", "POST", "/users", {"email": "newer@example.com"}),
        house.ask("owner", "POST", "/users/newer@example.com/reset"),
        house.ask("owner", "DELETE", "/users/newer@example.com"),
    ]
    assert [answer.status_code for answer in answers] == [201, 201, 200, 200, 201, 201, 200]
    for answer in answers:
        assert not set(members(answer.json())) & HIDDEN


def test_nobody_is_let_in_by_the_wrong_credential(house: House) -> None:
    for operation in OPERATIONS:
        for path in operation.paths:
            shown = house.who["operator" if path.startswith("/me") else "key"]
            url = f"{house.gateway.url}{PREFIX}{path.format(**house.own)}"
            for headers in ({}, shown):
                answer = httpx2.request(operation.method, url, headers=headers, **USUAL)
                assert answer.status_code == 401, path


def test_a_change_says_where_it_comes_from(house: House) -> None:
    cookie = {"Cookie": house.who["operator"]["Cookie"]}
    for origin in ({}, {"Origin": "null"}, {"Origin": "https://example.com"}):
        for operation in OPERATIONS:
            url = f"{house.gateway.url}{PREFIX}{operation.paths[0].format(**house.own)}"
            if operation.method != "GET":
                answer = httpx2.request(operation.method, url, headers=cookie | origin, **USUAL)
                assert answer.status_code == 403, operation.name


# ── The log of changes ───────────────────────────────────────────────────────────────────────────

UNLOGGED = {  # they change nothing that is kept, or are in the list of upstreams' changes
    *("end_session", "check_database", "test_webhook", "rest_upstream", "resume_upstream"),
    "reload",
    "accept_documents",  # which only owners do: tests/dashboard/test_acceptance.py
}
KINDS = {  # others are in the operation's name
    "add_prices": "price",
    "change_password": "user",
    "ask_for_closing": "account",
    "withdraw_closing": "account",
    "set_request_log": "request_log",
    "purge": "retention",
}


def test_every_change_is_logged_with_who_before_and_after(gateway: Gateway) -> None:
    house = built(gateway)
    account, key, notice = (house.own[name] for name in ("account", "key", "notice"))
    passwords = {"old_password": PASSWORD, "new_password": "incorrect pony battery staple 8"}
    made: list[tuple[str, str, str, Any, Any, Any]] = [
        ("add_account", "POST", "/accounts", {"name": "new"}, None, {"name": "new"}),
        (
            "set_account",
            "PATCH",
            f"/accounts/{account}",
            {"monthly_budget": "5"},
            {"monthly_budget": None},
            {"monthly_budget": "5"},
        ),
        (
            "throttle_account",
            "POST",
            f"/accounts/{account}/throttle",
            {"factor": "0.5"},
            {"throttle_factor": None},
            {"throttle_factor": "0.5"},
        ),
        (
            "suspend_account",
            "POST",
            f"/accounts/{account}/suspend",
            {"reason": REASON},
            {"status": "active", "status_reason": None},
            {"status": "suspended", "status_reason": REASON},
        ),
        (
            "resume_account",
            "POST",
            f"/accounts/{account}/resume",
            {},
            {"status": "suspended"},
            {"status": "active"},
        ),
        ("add_key", "POST", f"/accounts/{account}/keys", {"label": "l"}, None, {"label": "l"}),
        (
            "set_request_log",
            "PATCH",
            f"/accounts/{account}/request-log",
            {"days": None, "purge": True},
            None,
            {"erased_requests": 0},
        ),
        ("rotate_key", "POST", f"/keys/{key}/rotate", {}, {"expires_at": None}, {}),
        ("revoke_key", "POST", f"/keys/{key}/revoke", {}, {"revoked_at": None}, {}),
        (
            "compromise_key",
            "POST",
            f"/keys/{key}/compromised",
            {},
            {"compromised": False},
            {"compromised": True},
        ),
        (
            "add_prices",
            "POST",
            "/prices",
            {"prices": [{"model": "n", "input": "2.5"}]},
            None,
            {"model": "n", "input": "2.5"},
        ),
        (
            "add_payment",
            "POST",
            f"/accounts/{account}/payments",
            {"amount": "5"},
            None,
            {"amount": "5"},
        ),
        ("add_notice", "POST", "/notices", BODIES["add_notice"], None, {"text": "it is slow"}),
        ("withdraw_notice", "POST", f"/notices/{notice}/withdraw", {}, {"withdrawn_at": None}, {}),
        (
            "add_user",
            "POST",
            "/users",
            {"email": "new@example.com", "role": "operator"},
            None,
            {"email": "new@example.com", "role": "operator"},
        ),
        (
            "reset_user",
            "POST",
            f"/users/{house.own['user']}/reset",
            {},
            {"link_expires_at": None},
            {"password_set_at": None},
        ),
        (
            "remove_user",
            "DELETE",
            "/users/new@example.com",
            None,
            {"email": "new@example.com"},
            None,
        ),
        (
            "ask_for_closing",
            "POST",
            f"/accounts/{account}/closing",
            {},
            {"closing_asked_at": None},
            {},
        ),
        (
            "withdraw_closing",
            "DELETE",
            f"/accounts/{account}/closing",
            None,
            {},
            {"closing_asked_at": None},
        ),
        (
            "terminate_account",
            "POST",
            f"/accounts/{account}/terminate",
            {},
            {"status": "active", "terminated_at": None},
            {"status": "terminated"},
        ),
        (
            "set_time",
            "POST",
            "/db/set-time",
            {"time": "2026-01-01"},
            {},
            {"ledger_at": "2026-01-01T00:00:00.000Z"},
        ),
        ("purge", "POST", "/db/purge", {}, None, {"requests": 0}),
        ("change_password", "POST", "/login/password", passwords, {}, {}),  # the last: it logs out
    ]
    changing = {each.name for each in OPERATIONS if each.method != "GET"}
    assert {each[0] for each in made} == changing - UNLOGGED
    for name, method, path, body, before, after in made:
        known = house.last_change()
        answer = house.ask("operator", method, path, body)
        assert answer.status_code in (200, 201), (name, answer.text)
        changes = house.gateway.api("GET", "/changes")["changes"]
        kind = KINDS.get(name, name.rpartition("_")[2])
        change = next(each for each in changes if each["id"] > known and each["kind"] == kind)
        assert change["changed_by"] == "op@example.com", name
        assert_has(change["before"], before, name)
        assert_has(change["after"], after, name)
        assert change["before"] != change["after"], name


def assert_has(found: Any, wanted: Any, name: str) -> None:
    """All that is wanted, or None."""
    if wanted is None:
        assert found is None, name
    else:
        assert {member: found[member] for member in wanted} == wanted, name


def test_what_is_refused_is_not_logged(house: House) -> None:
    known = house.last_change()
    house.ask("operator", "POST", "/accounts", {"name": "first"})
    house.ask("operator", "POST", "/accounts", {"name": "new", "colour": "red"})
    house.ask("operator", "POST", "/prices", {"prices": [{"model": "n"}]})
    assert house.last_change() == known


def test_the_log_of_changes_is_only_added_to(gateway: Gateway) -> None:
    gateway.new_key()
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        before = database.execute("SELECT * FROM changes").fetchall()
        assert before
        for change in (
            "UPDATE changes SET changed_by = 'somebody else'",
            "UPDATE changes SET after = NULL WHERE id = 1",
            "DELETE FROM changes WHERE id = 1",
            "DELETE FROM changes",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="only ever added to"):
                database.execute(change)
        with pytest.raises(sqlite3.IntegrityError):  # nobody signs it
            database.execute("UPDATE accounts SET email = 'x@example.com'")
        database.rollback()
        assert database.execute("SELECT * FROM changes").fetchall() == before
