"""The pages that show stored bodies, and the setting: promises 6 and 7."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import backports.zstd
import pytest

from redbtc.dashboard.request_page import MAX_SHOWN_BYTES
from tests.helpers.gateway import Gateway
from tests.helpers.logins import Login, new_user
from tests.helpers.request_logs import set_log, stored
from tests.helpers.upstream import Upstream, json_answer, response_pieces, stream

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7]


class Room(NamedTuple):
    """An account whose requests are logged, and its owner's client."""

    gateway: Gateway
    key: str
    account: str
    owner: Login

    @property
    def path(self) -> str:
        return f"/dashboard/accounts/{self.account}"

    def logged_request(self, content: bytes, **headers: str) -> str:
        """Send a request; return its id once its bodies are stored."""
        with self.gateway.client(self.key) as client:
            given = {"content-type": "application/json", **headers}
            answer = client.post("/responses", content=content, headers=given)
        request_id = answer.headers["x-redbtc-request-id"]
        assert stored(self.gateway, request_id) == (content, answer.content)
        return request_id

    def shown(self, request_id: str, body: str) -> str | None:
        """Return what the page shows of a body; None if it is not text."""
        answer = self.owner.post(f"{self.path}/usage/{request_id}", do="show", body=body)
        assert answer.status_code == 200, answer.text
        found = re.search(rf'<code id="{body}-body">(.*?)</code>', answer.text, re.DOTALL)
        return html.unescape(found[1]) if found else None

    def readings(self) -> list[Any]:
        found = self.gateway.api("GET", f"/accounts/{self.account}/request-log")["readings"]
        return [each for each in found if each["by"].startswith("ada@")]


@pytest.fixture
def room(gateway: Gateway, closing: Callable[[Login], Login]) -> Room:
    key = gateway.new_key("a")
    set_log(gateway, "a", 7)
    owner = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    account = gateway.api("GET", "/accounts/a")["id"]
    return Room(gateway, key, account, owner)


NASTY = "</code><script>alert(1)</script>\r\n&amp;"


def test_a_body_is_shown_escaped_and_only_when_it_is_asked_for(
    room: Room, upstream: Upstream
) -> None:
    upstream.script = stream([*response_pieces([NASTY])])
    content = b'{"model":"gpt-up","input":"<b>\xc3\xa9", "stream":\r\n true}'
    request_id = room.logged_request(content)
    assert "Bodies stored" in room.owner.get(f"{room.path}/usage").text
    page = room.owner.get(f"{room.path}/usage/{request_id}").text
    assert "Show request body" in page
    assert "&lt;b&gt;" not in page
    assert room.readings() == []
    assert room.shown(request_id, "request") == content.decode()
    shown = room.shown(request_id, "response")
    assert shown == (stored(room.gateway, request_id)[1] or b"").decode()
    assert [each["body"] for each in room.readings()] == ["response", "request"]
    path = f"{room.path}/usage/{request_id}"
    file = room.owner.post(path, do="download", body="response")
    assert file.content == stored(room.gateway, request_id)[1]
    assert file.headers["content-type"] == "application/octet-stream"
    assert file.headers["content-disposition"] == f'attachment; filename="{request_id}-response"'
    assert room.owner.post(path, do="show", body="head").status_code == 404


def test_a_compressed_body_is_shown_decoded_and_only_its_beginning(
    room: Room, upstream: Upstream
) -> None:
    upstream.script = json_answer(b"\xff\x00binary")
    text = json.dumps({"model": "gpt-up", "input": "\u00e9" * MAX_SHOWN_BYTES}, ensure_ascii=False)
    packed = backports.zstd.compress(text.encode(), 1)
    packed = packed if len(text.encode()) < 32 * len(packed) else b""
    text = text if packed else json.dumps({"model": "gpt-up", "input": "Hi"})
    packed = packed or backports.zstd.compress(text.encode())
    request_id = room.logged_request(packed, **{"content-encoding": "zstd"})
    shown = room.shown(request_id, "request")
    assert shown == text.encode()[:MAX_SHOWN_BYTES].decode(errors="ignore")
    assert room.shown(request_id, "response") is None
    page = room.owner.post(f"{room.path}/usage/{request_id}", do="show", body="response").text
    assert "This body is not text. Download it." in page


def test_other_roles_and_accounts_see_no_body(
    room: Room, closing: Callable[[Login], Login]
) -> None:
    gateway, content = room.gateway, b'{"model":"gpt-up","input":"the canary"}'
    request_id = room.logged_request(content)
    gateway.new_key("b")
    others = gateway.api("GET", "/accounts/b")["id"]
    path = f"{room.path}/usage/{request_id}"
    logins = {
        "viewer": closing(new_user(gateway, "vi@example.com", "viewer", "a")),
        "operator": closing(new_user(gateway, "op@example.com")),
        "other": closing(new_user(gateway, "eve@example.com", "owner", "b")),
    }
    for role, login in logins.items():
        answers = [login.client.get(path), login.client.get(f"{room.path}/usage")]
        answers += [login.post(path, do=do, body="request") for do in ("show", "download")]
        if role == "operator":
            answers.append(login.client.get(f"/dashboard/accounts/{others}/usage/{request_id}"))
        expected = {
            "viewer": [200, 200, 403, 403],
            "operator": [200, 200, 403, 403, 404],
            "other": [404] * 4,
        }
        assert [each.status_code for each in answers] == expected[role], role
        assert all("the canary" not in each.text for each in answers)
        assert all("Show request body" not in each.text for each in answers)
        assert ("Bodies stored" in answers[1].text) == (role == "operator"), role
    own = f"/dashboard/accounts/{others}/usage"
    assert logins["other"].client.get(f"{own}/{request_id}").status_code == 404
    assert logins["other"].post(f"{own}/{request_id}", do="show", body="request").status_code == 404
    assert logins["viewer"].client.get(f"{room.path}/settings").status_code == 403
    assert room.readings() == []


def test_the_setting_is_changed_by_its_owner_alone(
    room: Room, closing: Callable[[Login], Login]
) -> None:
    gateway, settings = room.gateway, f"{room.path}/settings"
    operator = closing(new_user(gateway, "op@example.com"))
    page = operator.get(settings).text
    assert "so only its owner can switch logging on" in page
    assert "Keep bodies" not in page
    assert operator.post(settings, do="log_on", days="9").status_code == 403
    (key,) = gateway.api("GET", "/accounts/a/keys")["keys"]

    def days() -> tuple[int | None, int | None]:
        shown = gateway.api("GET", f"/accounts/{room.account}/request-log")
        return shown["log_days"], shown["keys"][0]["log_days"] if shown["keys"] else None

    assert room.owner.post(settings, do="log_on", days="9").status_code == 303
    assert room.owner.post(settings, do="log_on", days="3", of_key=key["id"]).status_code == 303
    assert days() == (9, 3)
    assert "ada@example.com of a" in operator.get(settings).text
    refused = room.owner.post(settings, do="log_on", days="many")
    assert (refused.status_code, "Expected a whole number" in refused.text) == (400, True)
    assert operator.post(settings, do="log_off").status_code == 303
    assert days() == (None, None)
    assert "by <bdi>an operator</bdi>" in room.owner.get(settings).text
    assert room.owner.post(settings, do="log_on", days="3", of_key=key["id"]).status_code == 303
    assert room.owner.post(settings, do="log_off", of_key=key["id"]).status_code == 303
    assert days() == (None, None)
    room_log = room.owner.post(settings, do="log_off", purge="1")
    assert (room_log.status_code, "erased" in room_log.text) == (200, True)
