"""Codex CLI's model catalogue: GET /v1/models?client_version=…, and its ETag on responses."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from websockets.sync.client import connect

from tests.helpers.codex import catalog_entry, catalog_text
from tests.helpers.credentials import settings_of, table, with_key
from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    UPSTREAM_KEY,
    USUAL,
    Gateway,
    MakeGateway,
    wait_for_length,
    wait_until,
)
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    openai_like,
    response_object,
    ws_like_openai,
)

pytestmark = pytest.mark.promise_1

ASKED = "/models?client_version=0.171.0"
CODEX = '[codex]\ncatalog = "codex-models.json"\n'
REFUSE = '[billing]\nunpriced_models = "refuse"\n'
NAMES = ("gpt-z", "gpt-a", "codex-auto-review", "other")
ENTRIES = [catalog_entry(name, future={"kept": [1.50, "\u00e9"]}) for name in NAMES]
OFTEN = """
import sys; sys.path.insert(0, sys.argv[1].rpartition("/")[0])
from redbtc.gateway import model_catalog; model_catalog.REFRESH_SECONDS = 0.02
model_catalog.FETCH_AGAIN_SECONDS = 0.02
model_catalog.SELECTION_SECONDS = 0.02
"""
BODY = {"model": "gpt-a", "input": "x"}
DEEP = "[" * 10_000 + "]" * 10_000  # nested too deeply for any reader


def catalog_gateway(
    make: MakeGateway, settings: str = CODEX, text: str = catalog_text(*ENTRIES), **more: Any
) -> Gateway:
    gateway = make(settings, **more)
    (gateway.folder / "codex-models.json").write_text(text)
    return gateway.start()


def catalog(gateway: Gateway, key: str, **headers: str) -> httpx2.Response:
    with gateway.client(key) as client:
        return client.get(ASKED, headers=headers)


def slugs(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return [model["slug"] for model in answer.json()["models"]]


def test_a_key_gets_what_it_may_use_and_what_is_priced(make_gateway: MakeGateway) -> None:
    served = 'models = ["gpt-*", "codex-*"]'
    gateway = catalog_gateway(make_gateway, REFUSE + CODEX, upstream_settings=served)
    key = gateway.new_key()
    assert slugs(catalog(gateway, key)) == []
    gateway.cli("price", "add", "gpt-*", "--input", "1", "--output", "1")
    gateway.cli("price", "add", "other", "--input", "1", "--output", "1")
    answer = catalog(gateway, key)
    assert slugs(answer) == ["gpt-z", "gpt-a"], "in the file's order; no upstream serves 'other'"
    text = catalog_text(*ENTRIES)
    for model in ENTRIES[:2]:
        entry = text[text.index('{\n   "slug": "' + model["slug"]) :]
        assert entry[: entry.index("\n  }")] in answer.text, "byte for byte"
    limited = gateway.api("POST", "/accounts/test/keys", {"models": ["*-a"]})["key"]
    assert slugs(catalog(gateway, limited)) == ["gpt-a"]
    gateway.cli("price", "add", "codex-auto-review", "--input", "1", "--output", "1")
    assert slugs(catalog(gateway, key)) == ["gpt-z", "gpt-a", "codex-auto-review"]
    with gateway.client(key) as client:
        for query in ("", "?client_version=1&client_version=2", "?client_versions=1"):
            assert client.get(f"/models{query}").json()["object"] == "list", query
    assert catalog(gateway, "sk-no").status_code == 401


def test_it_is_sent_again_only_if_it_has_changed(make_gateway: MakeGateway) -> None:
    gateway = catalog_gateway(make_gateway, REFUSE + CODEX)
    key = gateway.new_key()
    gateway.cli("price", "add", "gpt-*", "--input", "1", "--output", "1")
    first = catalog(gateway, key)
    etag = first.headers["etag"]
    assert etag.startswith('"')
    assert first.headers["cache-control"] == "private, no-cache"
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = catalog(gateway, key, **{"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b""), known
        assert answer.headers["etag"] == etag
        assert "content-length" not in answer.headers
    with gateway.client(key) as client:
        lines = [("if-none-match", '"other"'), ("if-none-match", etag)]
        assert client.get(ASKED, headers=lines).status_code == 304, "a list may have several lines"
    limited = gateway.api("POST", "/accounts/test/keys", {"models": ["*-a"]})["key"]
    assert catalog(gateway, limited, **{"if-none-match": etag}).status_code == 200
    of_limited = catalog(gateway, limited).headers["etag"]
    gateway.cli("price", "add", "other", "--input", "1", "--output", "1")
    assert catalog(gateway, key, **{"if-none-match": etag}).status_code == 200
    assert catalog(gateway, limited, **{"if-none-match": of_limited}).status_code == 304


def test_responses_say_which_catalogue_the_key_would_get(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    theirs = {"x-models-etag": '"theirs"'}
    upstream.script = json_answer(response_object(), headers=theirs)
    upstream.talk, upstream.handshake_headers = ws_like_openai, theirs
    gateway = catalog_gateway(make_gateway)
    limited = gateway.api("POST", "/accounts", {"name": "b"})["id"]
    limited = gateway.api("POST", f"/accounts/{limited}/keys", {"models": ["*-a"]})["key"]
    for key in (gateway.new_key(), limited):
        etag = catalog(gateway, key).headers["etag"]
        with gateway.client(key) as client:
            answer = client.post("/responses", json=BODY)
        assert answer.headers.get_list("x-models-etag") == [etag]
        url = f"ws://127.0.0.1:{gateway.port}/v1/responses"
        headers = {"authorization": f"Bearer {key}"}
        with connect(url, additional_headers=headers, proxy=None) as socket:
            assert socket.response is not None
            assert socket.response.headers.get_all("x-models-etag") == [etag]
    gateway.configure()
    gateway.signal(signal.SIGHUP)
    gateway.wait_for_log('"reloaded"')
    with gateway.client(limited) as client:
        assert client.post("/responses", json=BODY).headers["x-models-etag"] == '"theirs"'


def test_it_is_not_waited_for(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """Codex gives up after 5 seconds, also while its account has no free place."""
    asked, go_on = threading.Event(), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        asked.set()
        await reply.wait(go_on)
        await openai_like(request, reply)

    upstream.script = script
    gateway = catalog_gateway(make_gateway, CODEX + "[limits]\nqueue_seconds = 100\n")
    key = gateway.new_key(concurrency=1)
    with gateway.client(key) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(client.post, "/responses", json=BODY)
        asked.wait(PATIENCE_SECONDS)
        try:
            assert slugs(catalog(gateway, key)) == list(NAMES)
        finally:
            go_on.set()
        assert running.result().status_code == 200
    gateway.api("PATCH", "/accounts/test", {"requests_per_minute": 1})
    assert [catalog(gateway, key).status_code for _ in range(2)] == [200, 429]


def test_a_price_counts_when_it_takes_effect(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(REFUSE + CODEX)
    (gateway.folder / "codex-models.json").write_text(catalog_text(*ENTRIES))
    gateway.prelude = OFTEN
    gateway.start()
    key = gateway.new_key()
    gateway.cli("price", "add", "gpt-*", "--input", "1", "--output", "1", "--effective", "2s")
    assert slugs(catalog(gateway, key)) == []
    wait_until(lambda: slugs(catalog(gateway, key)) == ["gpt-z", "gpt-a"])


def test_without_the_setting_codex_keeps_its_own(gateway: Gateway, key: str) -> None:
    answer = catalog(gateway, key)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"
    assert "codex.catalog" in answer.json()["error"]["message"]
    assert catalog(gateway, "sk-no").status_code == 401


def test_a_bad_file_is_refused(make_gateway: MakeGateway) -> None:
    gateway = catalog_gateway(make_gateway)
    key, file = gateway.new_key(), gateway.folder / "codex-models.json"
    etag = catalog(gateway, key).headers["etag"]
    broken = dict(ENTRIES[1])
    del broken["shell_type"]
    bad = {
        catalog_text(ENTRIES[0], broken): "model 'gpt-a': shell_type: missing",
        '{"data": []}': "models: missing",
        '{"models": []}': "has 0 models; allowed are 1 to 1000",
        "not JSON": "expected what `codex debug models` prints",
        f'{{"models": {DEEP}}}': "expected what `codex debug models` prints",
    }
    for number, (text, reason) in enumerate(bad.items(), 1):
        file.write_text(text)
        gateway.signal(signal.SIGHUP)
        gateway.wait_for_log('"reload refused"', number)
        assert reason in gateway.log()
        assert catalog(gateway, key).headers["etag"] == etag
    assert gateway.log().count(f"codex.catalog: {file}: ") == len(bad)
    gateway.terminate()
    done = gateway.run("serve")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: codex.catalog: {file}: expected what `codex debug mod")
    file.unlink()
    assert (
        gateway.run("serve").stderr == f"Error: codex.catalog: {file}: No such file or directory\n"
    )
    file.write_text(catalog_text(*ENTRIES[:2]))
    gateway.start()
    assert slugs(catalog(gateway, key)) == ["gpt-z", "gpt-a"]
    file.write_text(catalog_text(ENTRIES[0]))
    gateway.signal(signal.SIGHUP)
    gateway.wait_for_log('"reloaded"')
    assert slugs(catalog(gateway, key)) == ["gpt-z"]


@pytest.mark.promise_9
@pytest.mark.parametrize("belongs", [True, False], ids=["the upstream's", "another"])
def test_a_url_is_fetched_in_the_background(
    make_gateway: MakeGateway, upstream: Upstream, belongs: bool
) -> None:
    """With the operator's key if it belongs to an upstream; the last good one is kept."""
    offered: dict[str, Any] = {"text": "", "status": 500}
    asked: list[Received] = []

    async def script(request: Received, reply: Reply) -> None:
        if "client_version" not in request.path:
            await openai_like(request, reply)
            return
        asked.append(request)
        await json_answer(offered["text"].encode(), offered["status"])(request, reply)

    def offer(text: str, status: int = 200) -> None:
        """Let the gateway fetch this, and then again, so that it has read it."""
        offered.update(text=text, status=status)
        wait_for_length(asked, len(asked) + 3)

    upstream.script = script
    with Upstream() as other:
        other.script = script
        place = upstream if belongs else other
        gateway = make_gateway(f'[codex]\ncatalog = "{place.url}/models"\n')
        gateway.prelude = OFTEN
        gateway.start()
        key = gateway.new_key()
        gateway.wait_for_log('"model catalog not fetched"')
        refused = catalog(gateway, key)
        assert refused.status_code == 502
        assert refused.json()["error"]["code"] == "upstream_unreachable"
        with gateway.client(key) as client:
            assert "x-models-etag" not in client.post("/responses", json=BODY).headers
        offer(catalog_text(*ENTRIES))
        first = catalog(gateway, key)
        assert slugs(first) == list(NAMES)
        offer("no catalogue")
        offer(f'{{"models": [{{"slug": {DEEP}}}]}}')
        offer("", 500)
        assert catalog(gateway, key).headers["etag"] == first.headers["etag"]
        offer(catalog_text(*ENTRIES[:1]))
        assert slugs(catalog(gateway, key)) == ["gpt-z"]
        authorization = f"Bearer {UPSTREAM_KEY}" if belongs else None
        assert {each.header("authorization") for each in asked} == {authorization}
        assert {each.path for each in asked} == {"/v1/models?client_version=0.171.0"}
        log = gateway.flushed_log()
        assert log.count('"model catalog not fetched"') == 2, "once for each outage"
        assert log.count('"model catalog fetched"') == 2


def test_a_failed_fetch_is_soon_tried_again(make_gateway: MakeGateway, upstream: Upstream) -> None:
    upstream.script = json_answer("", 500)
    gateway = make_gateway(f'[codex]\ncatalog = "{upstream.url}/models"\n')
    gateway.prelude = OFTEN.replace("REFRESH_SECONDS = 0.02", "REFRESH_SECONDS = 1000")
    gateway.start()
    gateway.wait_for_log('"model catalog not fetched"')
    upstream.script = json_answer(catalog_text(*ENTRIES).encode())
    gateway.wait_for_log('"model catalog fetched"')


def test_a_reload_keeps_the_catalogue_until_another_is_fetched(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """And fetches it again, also from the same URL."""
    gateway = catalog_gateway(make_gateway)
    key = gateway.new_key()

    def reload(number: int) -> None:
        gateway.signal(signal.SIGHUP)
        gateway.wait_for_log('"reloaded"', number)

    upstream.script = json_answer("", 500)
    gateway.configure(f'[codex]\ncatalog = "{upstream.url}/models"\n')
    reload(1)
    gateway.wait_for_log('"model catalog not fetched"')
    assert slugs(catalog(gateway, key)) == list(NAMES)
    for number, entries in enumerate((ENTRIES[:1], ENTRIES[1:2]), 2):
        upstream.script = json_answer(catalog_text(*entries).encode())
        reload(number)
        gateway.wait_for_log('"model catalog fetched"', number - 1)
        assert slugs(catalog(gateway, key)) == [entries[0]["slug"]]
    gateway.configure("")
    reload(4)
    assert catalog(gateway, key).status_code == 404


def test_a_client_with_a_credential_gets_the_models_that_it_opens(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Those of upstreams that are free for it need no price."""
    seats = table(upstream, "seats", models=["gpt-a"], credentials="client", billing="free")
    settings = settings_of(
        table(upstream, "operators", models=["gpt-z", "other"]),
        seats,
        codex={"catalog": "codex-models.json"},
        billing={"unpriced_models": "refuse"},
    )
    gateway = make_gateway(settings)
    (gateway.folder / "codex-models.json").write_text(catalog_text(*ENTRIES))
    gateway.start()
    gateway.cli("price", "add", "gpt-z", "--input=1")
    key = gateway.new_key()
    upstream.script = json_answer(response_object())
    names, etags = [], []
    for headers in ({"authorization": f"Bearer {key}"}, with_key(key)):
        with httpx2.Client(base_url=gateway.base_url, headers=headers, **USUAL) as client:
            found = client.get(ASKED)
            model = found.json()["models"][-1]["slug"]
            answer = client.post("/responses", json={"model": model, "input": "x"})
        assert answer.status_code == 200
        assert answer.headers["x-models-etag"] == found.headers["etag"]
        names.append([each["slug"] for each in found.json()["models"]])
        etags.append(found.headers["etag"])
    assert names == [["gpt-z"], ["gpt-z", "gpt-a"]]
    assert etags[0] != etags[1]


def test_only_responses_name_the_catalogue(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = catalog_gateway(make_gateway)
    upstream.script = json_answer(response_object(), headers={"x-models-etag": '"theirs"'})
    with gateway.client(gateway.new_key()) as client:
        answers = [client.post(f"/responses{path}", json=BODY) for path in ("", "/compact")]
    assert [each.headers.get("x-models-etag") for each in answers] == [
        catalog(gateway, gateway.new_key()).headers["etag"],
        None,
    ]
