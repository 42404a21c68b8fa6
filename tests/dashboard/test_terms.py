"""The pages /terms and /privacy and /.well-known/security.txt: what is published, and when."""

from __future__ import annotations

import asyncio
import json
import re
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from redbtc.billing.documents import Published
from redbtc.dashboard import document_pages
from redbtc.dashboard.markdown import RenderedMarkdown
from tests.helpers.documents import days_ahead, reload, write_document
from tests.helpers.gateway import Gateway, MakeGateway, wait_until

pytestmark = pytest.mark.promise_6

SITE = '[site]\nterms = "terms.md"\n'
NO_NOTICE = f'{SITE}[billing]\nunpriced_models = "free"\nterms_notice_days = 0\n'


@pytest.fixture
def terms(make_gateway: MakeGateway) -> Gateway:
    """A running gateway with a first version of its terms."""
    gateway = make_gateway(f"[server]\n{SITE}")
    write_document(gateway, "1", text="# Our terms\n\nBe *kind*.")
    return gateway.start()


def notices(gateway: Gateway) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.api("GET", "/notices")["notices"]
    return found


def published(gateway: Gateway) -> list[tuple[str, str]]:
    found = gateway.api("GET", "/documents")["documents"]
    return [(each["document"], each["version"]) for each in found]


def test_the_first_version_is_shown_to_everybody(terms: Gateway) -> None:
    page = terms.get("/terms")
    assert page.status_code == 200
    assert "<h1>Our terms</h1>" in page.text
    assert "<em>kind</em>" in page.text
    assert "version 1, which took effect on 2020-01-01" in page.text
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers.get_list("cache-control") == ["public, max-age=60"]
    status = terms.get("/status", headers={"accept": "text/html"})
    for name in ("content-security-policy", "x-content-type-options", "x-frame-options"):
        assert page.headers[name] == status.headers[name]
    assert "set-cookie" not in page.headers
    head = terms.raw(b"HEAD /terms HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert head.endswith(b"\r\n\r\n")
    wrong = terms.raw(b"POST /terms HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
    assert wrong.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nallow: get, head\r\n" in wrong.lower()
    assert notices(terms) == [], "there was nothing before it"
    for unknown in ("2", "", "%00", "1%26", "x" * 600):
        answer = terms.get(f"/terms?version={unknown}")
        assert (answer.status_code, "There is no such version." in answer.text) == (404, True)
        assert answer.headers["cache-control"] == "no-store"
    assert terms.get("/terms?version=1").status_code == 200
    changes = terms.api("GET", "/changes")["changes"]
    (change,) = [each for each in changes if each["kind"] == "terms"]
    assert (change["object_id"], change["changed_by"]) == ("terms", "config.toml")
    assert change["after"] == {"version": "1", "effective_at": "2020-01-01T00:00:00.000Z"}


def test_pages_that_the_settings_do_not_name_are_unknown(terms: Gateway) -> None:
    for path in ("/privacy", "/.well-known/security.txt", "/terms/"):
        answer = terms.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    for path in ("/dashboard/login", "/status"):
        text = terms.get(path, headers={"accept": "text/html"}).text
        assert '<a href="/terms">Terms of service</a>' in text
        assert "/privacy" not in text
    terms.configure()
    reload(terms, '"reloaded"')
    wait_until(lambda: terms.get("/terms").status_code == 404)
    assert "/terms" not in terms.get("/dashboard/login").text
    assert published(terms) == [("terms", "1")], "what was published stays"


def test_a_new_version_needs_notice(terms: Gateway) -> None:
    earliest = f"{datetime.now(UTC) + timedelta(days=14):%Y-%m-%d}"
    write_document(terms, "2", days_ahead(13))
    reload(terms, '"reload refused"')
    said = json.loads(terms.log().splitlines()[-1])["reason"]
    assert "needs 14 days of notice (billing.terms_notice_days)" in said
    assert said[-10:] >= earliest
    checked = terms.run("check", "--json")
    assert (checked.returncode, len(json.loads(checked.stdout)["problems"])) == (2, 1)
    assert json.loads(checked.stdout)["problems"] == [said]
    assert published(terms) == [("terms", "1")]
    write_document(terms, "2", said[-10:])
    assert terms.run("check").returncode == 0
    assert published(terms) == [("terms", "1")], "a check publishes nothing"
    terms.terminate()
    write_document(terms, "2", days_ahead(13))
    refused = terms.run("serve")
    assert refused.returncode == 1
    assert "The earliest date is" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_coming_version_is_announced(terms: Gateway) -> None:
    key = terms.new_key()
    day = days_ahead(20)[:10]
    write_document(terms, "2", day, "# Our new terms")
    reload(terms)
    page = terms.get("/terms").text
    assert "<h1>Our terms</h1>" in page, "it is not in force yet"
    assert '<a href="/terms?version=2">version 2</a> takes effect on ' + day in page
    coming = terms.get("/terms?version=2").text
    assert "<h1>Our new terms</h1>" in coming
    assert 'The version in force is <a href="/terms?version=1">version 1</a>' in coming
    (notice,) = notices(terms)
    assert (notice["kind"], notice["added_by"]) == ("terms", "config.toml")
    assert notice["effective_at"] == f"{day}T00:00:00.000Z"
    assert notice["text"] == (
        f"Terms of service: version 2 takes effect on {day}. Read it at {terms.url}/terms?version=2"
    )
    assert terms.get("/status").json()["notices"][0]["text"] == notice["text"]
    with terms.client(key) as client:
        me = client.get(f"{terms.url}/admin/v1/me/notices").json()
    assert [each["id"] for each in me["notices"]] == [notice["id"]]
    kinds = [each["kind"] for each in terms.api("GET", "/changes")["changes"]]
    assert kinds[:2] == ["terms", "notice"]
    terms.restart()
    assert (len(notices(terms)), published(terms)) == (1, [("terms", "1"), ("terms", "2")])


def test_a_version_takes_effect_and_the_earlier_one_stays(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(f"[server]\n{NO_NOTICE}")
    write_document(gateway, "1", text="Old text.")
    gateway.start()
    write_document(gateway, "2", days_ahead(2 / 86400), text="New text.")
    reload(gateway)
    wait_until(lambda: "New text." in gateway.get("/terms").text)
    assert "Old text." not in gateway.get("/terms").text
    before = gateway.get("/terms?version=1").text
    assert "Old text." in before
    assert 'The version in force is <a href="/terms?version=2">version 2</a>' in before
    gateway.restart()
    assert "Old text." in gateway.get("/terms?version=1").text


def test_a_published_text_stays(terms: Gateway) -> None:
    write_document(terms, "1", text="Be evil.")
    reload(terms, '"reload refused"')
    assert "was published with another text; give the new text a new version" in terms.log()
    assert "evil" not in terms.get("/terms").text
    assert "was published with another text" in terms.run("check").stdout
    terms.terminate()
    assert "was published with another text" in terms.run("serve").stderr
    write_document(terms, "1", effective=days_ahead(30), text="# Our terms\n\nBe *kind*.")
    assert "was published with another date, 2020-01-01" in terms.run("check").stdout
    (terms.folder / "terms.md").unlink()
    for command in ("check", "serve"):
        done = terms.run(command)
        assert f"site.terms: {terms.folder}/terms.md: No such file" in done.stdout + done.stderr


def test_a_kill_leaves_a_version_with_its_notice_or_neither(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(f"[server]\n{NO_NOTICE}")
    write_document(gateway, "1")
    gateway.start()
    for number in range(2, 8):
        write_document(gateway, str(number), days_ahead(number))
        gateway.signal(1)
        time.sleep(number % 3 * 0.004)  # anywhere in its work
        gateway.kill()
        gateway.start()
        versions = [version for _, version in published(gateway)]
        assert versions == [str(each) for each in range(1, number + 1)], "now it is published"
        said = [re.findall(r"version (\d+) takes", each["text"]) for each in notices(gateway)]
        assert sorted(said) == [[str(each)] for each in range(2, number + 1)]


def test_two_reloads_at_once_publish_once(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(f"[server]\n{NO_NOTICE}")
    write_document(gateway, "1")
    gateway.start()
    write_document(gateway, "2", days_ahead(1))
    for _ in range(5):
        gateway.signal(1)
    gateway.wait_for_log('"version":"2"')
    assert len(notices(gateway)) == 1
    reload(gateway, '"reloaded"')
    assert "not published" not in gateway.log()


HOSTILE = """# Terms <script>document.title='owned'</script>

<script>document.title = "owned"</script>
<img src=x onerror="document.title='owned'">

[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](&#106;avascript:alert(1))
[d](data:text/html,<script>alert(1)</script>) [e](vbscript:x) [f](java%0ascript:alert(1))
[g]( javascript:alert(1)) [h](<java\tscript:alert(1)>) [i]: <javascript:alert(1)> <javascript:x>
[ok](https://example.com/?a=b:c) [mail](mailto:a@b.c) [rel](privacy#a:b) [abs](/privacy)
![alt <b>"text](https://evil.example/x.png) ![x](javascript:x)

| a | b |
|---|---|
| <style>* {display: none}</style> | `</td><script>` |

"""


def test_hostile_markdown_is_inert(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(f"[server]\n{SITE}")
    write_document(gateway, "1", text=HOSTILE)
    page = gateway.start().get("/terms").text
    content = page.partition("<article")[2].partition("</article>")[0]
    tags = set(re.findall(r"<(/?[a-zA-Z]\w*)", content))
    inline = {"h1", "p", "a", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert {tag.lstrip("/") for tag in tags} <= inline
    links = re.findall(r'<a href="([^"]*)"', content)
    safe = ["https://example.com/?a=b:c", "mailto:a@b.c", "privacy#a:b", "/privacy"]
    assert links == safe
    assert "evil.example" not in page, "no page loads an image"
    assert "alt &lt;b&gt;&quot;text" in content


def test_a_deep_and_long_text_is_shown(make_gateway: MakeGateway) -> None:
    """Neither recursion nor repeated searches end the process or take minutes."""
    gateway = make_gateway(f"[server]\n{SITE}")
    text = "> " * 20_000 + "\n\n" + "- " * 20_000 + "\n\n" + "[" * 20_000 + "![" * 20_000
    write_document(gateway, "1", text=text + "*a **b " * 8_000 + "\n\nThe end.")
    gateway.start()
    assert "The end." in gateway.get("/terms").text


class ManyVersions:
    """The documents of a gateway with many versions of its terms."""

    def __init__(self, count: int) -> None:
        self._all = [Published("terms", str(each), each, 0, b"") for each in range(count)]

    def versions(self, _: str) -> list[Published]:
        return self._all

    def in_force(self, _: str) -> Published:
        return self._all[-1]

    async def text(self, each: Published) -> str:
        return each.version


def test_a_version_is_rendered_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []

    def render(text: str) -> RenderedMarkdown:
        rendered.append(text)
        return RenderedMarkdown("", True)

    async def page(_: str, variables: Any) -> Any:
        return variables["shown"].version

    monkeypatch.setattr(document_pages, "render_markdown", render)
    count = document_pages.MAX_RENDERED + 1
    store = SimpleNamespace(time=lambda: count)
    billing = SimpleNamespace(documents=ManyVersions(count), store=store)
    api, renderer = SimpleNamespace(billing=billing), SimpleNamespace(render=page)
    pages = document_pages.DocumentPages(cast(Any, api), cast(Any, renderer))

    async def read() -> None:
        everybody = await asyncio.gather(*(pages.show("terms", None) for _ in range(9)))
        assert {str(each) for each in everybody} == {str(count - 1)}
        assert rendered == [str(count - 1)]
        for version in range(count - 1):
            await pages.show("terms", str(version))
            await pages.show("terms", None)  # used again and again, it is kept
        assert rendered == [str(count - 1), *map(str, range(count - 1))]
        await pages.show("terms", "0")
        assert rendered[-1] == "0", "others are not kept for ever"

    asyncio.run(read())


def test_security_txt(make_gateway: MakeGateway) -> None:
    settings = '[server]\n{}[site]\ncontact = "{}"\n'
    gateway = make_gateway(settings.format("", "security@example.com")).start()
    answer = gateway.get("/.well-known/security.txt")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    contact, expires = [line.split(": ", 1) for line in answer.text.splitlines()]
    assert contact == ["Contact", "mailto:security@example.com"]
    assert expires[0] == "Expires"
    ahead = datetime.fromisoformat(expires[1]) - datetime.now(UTC)
    assert timedelta(days=300) < ahead < timedelta(days=366)
    url = 'public_url = "https://ai.example.com/"\n'
    gateway.configure(settings.format(url, "https://example.com/report"))
    reload(gateway, '"reloaded"')
    lines = gateway.get("/.well-known/security.txt").text.splitlines()
    assert lines[0] == "Contact: https://example.com/report"
    assert lines[2] == "Canonical: https://ai.example.com/.well-known/security.txt"
    gateway.configure(settings.format("", "a@b.c\\nExpires: x"))
    reload(gateway, '"reload refused"')
    assert gateway.get("/.well-known/security.txt").text.splitlines() == lines
