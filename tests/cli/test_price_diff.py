"""`price diff` through the front door: lists in files, on standard input and at URLs, good and
hostile ones, and a file that is imported as it is."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import redbtc_proxy  # noqa: F401 (adds all commands)
from redbtc.cli import price_sources
from redbtc.cli.main import commands
from redbtc.cli.price_diff import DIFF_COLUMNS
from redbtc.cli.price_sources import LITELLM_URL
from redbtc.upstream.certificates import context_trusting
from tests.helpers.certificates import Authority
from tests.helpers.gateway import ROOT, MakeGateway
from tests.helpers.upstream import Upstream
from tests.store.faults import post

pytestmark = pytest.mark.promise_8

LITELLM = ROOT / "tests" / "billing" / "lists" / "litellm.json"
MODELS_DEV = ROOT / "tests" / "billing" / "lists" / "models.dev.json"

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command on a stopped gateway; returns what click's runner does."""
    (tmp_path / "config.toml").write_text("")

    def invoke(*words: str | Path, stdin: str | None = None) -> Result:
        arguments = ["--config", str(tmp_path / "config.toml"), *map(str, words)]
        return CliRunner().invoke(commands, arguments, input=stdin)

    return invoke


def said(done: Result) -> str:
    """Return what a failed command has said in one line."""
    assert done.exit_code == 1
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_the_example_prices_become_those_of_the_list(run: Run, tmp_path: Path) -> None:
    assert run("price", "import", ROOT / "prices.toml").exit_code == 0
    before = run("price", "list", "--json").stdout
    new = tmp_path / "new.toml"
    done = run("price", "diff", LITELLM, "--to", new)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == DIFF_COLUMNS
    row = ["gpt-4.1", "default", "0", "web_search", "0.01", "0.025", "+150.0", "%"]
    assert row in [line.split() for line in lines]
    assert f"Compared with {LITELLM} (LiteLLM)." in lines
    assert any("left as they are" in line for line in lines)
    assert run("price", "list", "--json").stdout == before, "nothing was changed"
    as_json = json.loads(run("price", "diff", LITELLM, "--json").stdout)
    change = next(each for each in as_json["changes"] if each["model"] == "gpt-4.1")
    rate = {"rate": "web_search", "now": "0.01", "then": "0.025", "change_percent": "+150.0"}
    assert rate in change["rates"]
    assert run("price", "diff", LITELLM, "--exit-code").exit_code == 3
    printed = run("price", "diff", LITELLM, "--toml").stdout
    assert printed == new.read_text()
    assert said(run("price", "diff", LITELLM, "--to", new)) == (
        f"{new} exists; choose another file, or remove it"
    )
    imported = json.loads(run("price", "import", new, "--json").stdout)
    assert imported["added"] == len(as_json["changes"])
    assert imported["unchanged"] == 0
    after = run("price", "diff", LITELLM, "--exit-code")
    assert after.exit_code == 0
    assert after.stdout.splitlines()[1].startswith("0 prices differ from those of the list")
    assert run("price", "diff", LITELLM, "--json", "--toml").exit_code == 2


@pytest.mark.process
def test_tiers_that_are_left_out_are_named(run: Run) -> None:
    assert run("price", "import", ROOT / "prices.toml").exit_code == 0
    lines = run("price", "diff", LITELLM, "--provider", "azure").stdout.splitlines()
    reason = "the list has only some of its prices."
    assert f"Left out gpt-5.5 (flex, above 272000 input tokens): {reason}" in lines
    found = json.loads(run("price", "diff", LITELLM, "--provider", "azure", "--json").stdout)
    assert [(each["tier"], each["above_input_tokens"]) for each in found["problems"]] == [
        ("flex", 0),
        ("flex", 272_000),
    ]


@pytest.mark.process
@pytest.mark.parametrize("name", ["a b", "é😀", "\x7f\\", 'a"b'])
def test_the_files_name_can_be_anything(run: Run, tmp_path: Path, name: str) -> None:
    source, new = tmp_path / name, tmp_path / f"{name}.toml"
    source.write_bytes(LITELLM.read_bytes())
    assert run("price", "import", ROOT / "prices.toml").exit_code == 0
    done = run("price", "diff", source, "--to", new)
    last = shlex.split(done.stdout.splitlines()[-1].partition("redbtc-proxy ")[2])
    assert last == ["price", "import", str(new)]
    done = run(*last)
    assert done.exit_code == 0, done.exception


def test_a_model_that_was_requested_is_compared_and_its_rise_announced(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path
) -> None:
    gateway = make_gateway().start()
    assert post(gateway, gateway.new_key()) == (200, "")
    cost = {"input_cost_per_token": 2.5e-06, "output_cost_per_token": 1.0e-05}
    list_file = tmp_path / "list.json"
    list_file.write_text(json.dumps({"gpt-up": {"litellm_provider": "openai", **cost}}))
    found = gateway.cli("price", "diff", str(list_file))
    (change,) = found["changes"]
    assert (change["is_new"], change["needs_notice"]) == (True, True), "it was free"
    new = tmp_path / "new.toml"
    shown = gateway.run("price", "diff", str(list_file), "--to", str(new)).stdout
    assert f"can be in force from {change['in_force_from'][:16]}" in shown
    imported = gateway.cli("price", "import", str(new))
    (added,) = imported["prices"]
    assert (added["input"], added["output"], added["status"]) == ("2.5", "10", "coming")
    assert added["effective_at"] > change["in_force_from"]
    assert len(imported["notices"]) == 1
    assert gateway.cli("price", "diff", str(list_file))["changes"] == []


def test_models_dev_and_other_forms_of_a_list(run: Run, tmp_path: Path) -> None:
    run("price", "add", "gpt-5.4", "--input", "2", "--cached-input", "0.25", "--output", "15")
    found = json.loads(run("price", "diff", MODELS_DEV, "--json").stdout)
    assert found["kind"] == "models.dev"
    assert [each["above_input_tokens"] for each in found["changes"]] == [0, 272_000]
    piped = run("price", "diff", "-", "--json", stdin=MODELS_DEV.read_text()).stdout
    assert json.loads(piped)["changes"] == found["changes"]
    listed = json.loads(
        run("price", "diff", MODELS_DEV, "--provider", "google", "--all", "--json").stdout
    )
    assert {each["model"] for each in listed["changes"]} == {"gemini-2.5-pro"}
    mine = tmp_path / "mine.toml"
    mine.write_text('prices = [{ model = "gpt-5.4", input = 2.0, output = 15 }]')
    found = json.loads(run("price", "diff", mine, "--json").stdout)
    assert found["kind"] == "TOML"
    rate = {"rate": "cached_input", "now": "0.25", "then": None, "change_percent": None}
    assert found["changes"][0]["rates"] == [rate]


def test_a_list_in_another_currency_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[billing]\ncurrency = "EUR"\n')
    assert said(run("price", "diff", LITELLM)) == (
        "the list is in USD, but billing.currency is EUR, so they can't be compared"
    )
    assert "in USD" in said(run("price", "diff", ROOT / "prices.toml"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "not valid UTF-8"),
        (b"", "no prices found"),
        (b"[" * 100_000, "not valid TOML"),
        (b'prices = [{ model = "m", input = 1e999999999 }]', "Expected an amount such as 12.50"),
        (b'prices = [{ model = "m", input = nan }]', "Expected an amount"),
        (b'prices = [{ model = "m", input = -1 }]', "out of range"),
        (b'prices = [{ model = "m", input = 1 }, { model = "m", input = 2 }]', "two prices of m"),
        (b'prices = [{ model = "m", inputs = 1 }]', "inputs"),
        (b'prices = [{ model = "a\\u0007", input = 1 }]', "not a model name"),
        (b"x = " + b"[" * 100_000, ""),
        (b"x = " + b"9" * 100_000, "not valid TOML"),
        (b'{"gpt-5.5": NaN}', "does not allow"),
    ],
)
def test_a_hostile_file_is_refused_in_one_line(
    run: Run, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "list").write_bytes(content)
    line = said(run("price", "diff", tmp_path / "list"))
    assert words in line
    assert len(line) < 600
    assert line.isprintable()


def test_a_file_that_is_too_large_or_endless_is_refused(run: Run, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(200 << 20)
    words = "has more than 32 MiB: this is no list of prices"
    assert said(run("price", "diff", large)) == f"{large} {words}"
    assert said(run("price", "diff", "/dev/zero")) == f"/dev/zero {words}"
    assert said(run("price", "diff", tmp_path)) == f"{tmp_path}: Is a directory"
    missing = tmp_path / "missing"
    assert said(run("price", "diff", missing)) == f"{missing}: No such file or directory"


def test_names_of_a_list_do_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    name = "m\u009b31m"
    run("price", "add", "m*", "--input", "1")
    fields = {"litellm_provider": "openai", "input_cost_per_token": 0}
    file = tmp_path / "l\u009b31m.json"
    file.write_text(json.dumps({name: fields, "m2": fields, "\u202em": fields}))
    for arguments in (["--all"], ["--toml"]):
        printed = run("price", "diff", file, *arguments).stdout
        assert printed.replace("\n", "").isprintable()


# Over the network


class Site:
    """An https server. `answers` has for each path a status, headers and a body; `asked` are the
    headers of the requests."""

    def __init__(self, authority: Authority) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], Iterator[bytes] | bytes]] = {}
        self.asked: list[dict[str, str]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append({name.lower(): value for name, value in self.headers.items()})
                status, headers, body = site.answers[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for part in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(part)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = authority.server_context().wrap_socket(
            self._server.socket, server_side=True
        )
        self.url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def site(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    trusted = authority.file.read_text()
    monkeypatch.setattr(price_sources, "system_context", lambda: context_trusting(trusted))
    site = Site(authority)
    yield site
    site.close()


def test_a_list_at_a_url(
    run: Run, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine localhost login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    site.answers["/list"] = 200, {}, LITELLM.read_bytes()
    site.answers["/moved"] = 302, {"location": "list"}, b""
    done = run("price", "diff", f"{site.url}/moved", "--all", "--json")
    assert json.loads(done.stdout)["changes"]
    assert all("authorization" not in asked for asked in site.asked)
    assert {asked["accept-encoding"] for asked in site.asked} == {"identity"}


def test_what_is_fetched_is_bounded(run: Run, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price_sources, "MAX_LIST_BYTES", 1 << 20)
    monkeypatch.setattr(price_sources, "MAX_FETCH_SECONDS", 0.5)
    stop = threading.Event()

    def drop_by_drop() -> Iterator[bytes]:
        while not stop.wait(0.05):
            yield b" "

    site.answers |= {
        "/endless": (200, {}, iter(lambda: b"x" * 65536, b"")),
        "/slow": (200, {}, drop_by_drop()),
        "/gzip": (200, {"content-encoding": "gzip"}, b"x"),
        "/error": (404, {}, b"not here"),
        "/circle": (302, {"location": "/circle"}, b""),
        "/plain": (302, {"location": "http://localhost:9/"}, b""),
        "/file": (302, {"location": "file:///etc/passwd"}, b""),
        "/user": (302, {"location": f"https://me:secret@{site.url[8:]}/list"}, b""),
        "/nowhere": (302, {}, b""),
    }
    expected = {
        "/endless": "has more than 1 MiB",
        "/slow": "not complete after 0.5 seconds",
        "/gzip": "the answer is compressed",
        "/error": "status 404",
        "/circle": "more than 5 redirects",
        "/plain": "http://localhost:9/: lists are fetched from https URLs only",
        "/file": "/etc/passwd: lists are fetched from https URLs only",
        "/user": "a URL with a user name or password can't be used",
        "/nowhere": "more than 5 redirects",
    }
    for path, words in expected.items():
        line = said(run("price", "diff", f"{site.url}{path}"))
        assert words in line
        assert "secret" not in line
    stop.set()


def test_urls_that_are_never_fetched(run: Run) -> None:
    for url in ("http://example.com/l.json", "file:///etc/passwd", "ftp://h/x", "https://"):
        assert "https URLs only" in said(run("price", "diff", url))
    assert "user name or password" in said(run("price", "diff", "https://me:secret@h/x"))


def test_a_server_without_a_trusted_certificate_is_refused(run: Run, authority: Authority) -> None:
    site = Site(authority)
    assert "CERTIFICATE_VERIFY_FAILED" in said(run("price", "diff", f"{site.url}/list"))
    site.close()


def test_without_a_source_litellms_map_is_fetched(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(url: str) -> bytes:
        fetched.append(url)
        return LITELLM.read_bytes()

    monkeypatch.setattr(price_sources, "fetch_list", fetch)
    assert f"Compared with {LITELLM_URL} (LiteLLM)." in run("price", "diff").stdout
    assert fetched == [LITELLM_URL]
