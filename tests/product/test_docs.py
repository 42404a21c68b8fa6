"""The documentation is true: its links resolve, its commands work, and docs/contract.md names what
the code has, no more and no less."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import redbtc_proxy  # noqa: F401 (adds all commands)
from redbtc.admin.api import OPERATIONS
from redbtc.billing.reports import RequestShown
from redbtc.cli.main import commands
from redbtc.config import Settings, parse_settings
from redbtc.gateway.endpoints import METERED
from redbtc.refusals import REFUSALS
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.tools import needs

MAX_README_LINES = 200
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PACKAGE = ROOT / "redbtc"
TESTS = ROOT / "tests"
CONTRACT = DOCS / "contract.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "bench" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
CALL = re.compile(r"(?:redbtc-proxy|redbtc_proxy\.py) ([a-z-][^`\n]*)")
TARGET = re.compile(r"(?:^|`)make ([a-z-]+)", re.MULTILINE)


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", text)


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page that are in one language."""
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    texts = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {text.replace(" ", "-") for text in texts}


def section(number: int) -> str:
    """Return a numbered section of docs/contract.md."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", CONTRACT.read_text(), re.M | re.S)
    assert found
    return found[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def spans(text: str) -> list[str]:
    """Return what is marked as code in a text."""
    return re.findall(r"`([^`]+)`", text)


def leaves(group: click.Group, names: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield each command that does something, with its names: of a group, its commands first."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{names}{name} ")
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield f"{names}{name}", command


LEAVES = dict(leaves(commands))


# ── Links and commands ───────────────────────────────────────────────────────────────────────────


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    links = [link or source for link, source in LINK.findall(prose(page.read_text()))]
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link for link, _ in LINK.findall(README.read_text())}
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= linked


def test_the_architecture_names_files_that_exist() -> None:
    page = (DOCS / "architecture.md").read_text()
    named = [span for span in spans(prose(page)) if re.fullmatch(r"[\w/]+(\.py|/)", span)]
    assert named
    missing = {each for each in named if not any((at / each).exists() for at in (ROOT, PACKAGE))}
    assert not missing


def parsed(words: list[str]) -> str:
    """Parse a command line without executing it and return the names of its command. Raises
    click.UsageError if there is no such command, argument or option, or a value is wrong."""
    if words[0] == "--config":
        words = words[2:]
    size = 1 if words[0] in LEAVES and " ".join(words[:2]) not in LEAVES else 2
    name = " ".join(words[:size])
    assert name in LEAVES, f"there is no command {name!r}"
    LEAVES[name].make_context(name, words[size:])
    return name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in CALL.findall(page.read_text().replace("\\\n", " ")):
        parsed(shlex.split(line, comments=True))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(TARGET.findall(page.read_text())) <= set(targets)


def commands_of(page: Path) -> list[list[str]]:
    """Return the words of the gateway's commands in a page's shell blocks."""
    code = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["redbtc-proxy"]]


# Those that are executed by other tests, and would change this process, or need another program.
ELSEWHERE = (
    "db backup",
    "db restore",
    "db set-time",
    "codex catalog",
    "init",
    "price diff",
    "reload",
    "serve",
)


@pytest.mark.parametrize("name", ["README.md", "operating.md", "billing.md", "dashboard.md"])
def test_commands_work_as_written(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The commands of a page do what they say, one after the other."""
    page = README if name == "README.md" else DOCS / name
    monkeypatch.chdir(ROOT)
    config, runner = str(make_gateway().config), CliRunner()

    def run(*words: str) -> str:
        done = runner.invoke(commands, ["--config", config, *words])
        assert done.exit_code == 0, f"{words}: {done.output}"
        return done.stdout

    written = commands_of(page)
    if ["account", "add", "alice"] not in [words[:3] for words in written]:
        run("account", "add", "alice")
    executed = 0
    for words in written:
        if parsed(words) in ELSEWHERE:
            continue
        if "key_…" in words:
            keys = json.loads(run("key", "list", "alice", "--json"))["keys"]
            words[words.index("key_…")] = keys[-1]["id"]
        run(*words)
        executed += 1
    assert executed


def test_the_readme_shows_what_the_first_start_prints(make_gateway: MakeGateway) -> None:
    """Each line that the README shows is printed; an ellipsis stands for anything."""
    gateway = make_gateway().start("--first-run", "--demo")
    wait_until(lambda: "Dashboard" in gateway.log())
    printed = gateway.log().replace(str(gateway.port), "8080").splitlines()
    shown = [line for line in blocks(README, "text")[0].splitlines() if line]
    assert shown
    for line in shown:
        pattern = re.escape(line).replace("…", ".*")
        pattern = pattern.replace(re.escape(".venv/bin/python redbtc_proxy.py"), ".*")
        assert any(re.fullmatch(pattern, each) for each in printed), line


@pytest.mark.parametrize("page", [README, DOCS / "clients.md"], ids=lambda page: page.name)
def test_requests_answer_as_written(make_gateway: MakeGateway, page: Path) -> None:
    gateway = make_gateway().start("--demo")
    needs("curl")
    env = {**os.environ, "REDBTC_API_KEY": gateway.new_key()}
    requests = [code for code in blocks(page, "sh") if code.startswith("curl ")]
    assert requests
    for code in requests:
        code = code.replace("curl ", "curl -sSf ").replace(":8080", f":{gateway.port}")
        done = subprocess.run(["sh", "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        streamed = done.stdout.endswith("data: [DONE]\n\n")
        assert streamed or json.loads(done.stdout)


# ── The contract ─────────────────────────────────────────────────────────────────────────────────


def test_the_contract_names_every_command_and_option() -> None:
    documented: dict[str, str] = {}
    for first, second in rows(section(1)):
        for span in spans(first):
            name = next(name for name in LEAVES if f"{span} ".startswith(f"{name} "))
            documented[name] = f"{first} {second}"
    assert documented.keys() == LEAVES.keys()
    documented["account set"] += documented["account add"]
    documented["user remove"] += documented["user reset"]
    for name, command in LEAVES.items():
        options = [each for each in command.params if isinstance(each, click.Option)]
        known = {option.opts[0] for option in options} - {"--json"}
        named = set(re.findall(r"--[a-z][a-z0-9-]*", documented[name]))
        assert named == known, name


def test_the_contract_names_every_setting_with_its_default() -> None:
    (code,) = blocks(CONTRACT, "toml")
    shown = tomllib.loads(code)
    assert parse_settings(shown) == Settings()
    assert names_in(code) == names_in((ROOT / "config.toml").read_text())


def names_in(code: str) -> list[str]:
    """Return the names of settings and their tables, in order."""
    return re.findall(r"^(\[+[\w.]+\]+|\w+ =)", code, re.MULTILINE)


def test_the_contract_names_every_error() -> None:
    named = {code: int(status) for status, codes, _ in rows(section(4)) for code in spans(codes)}
    assert named == {code: status for code, (status, _, _) in REFUSALS.items()}


def test_the_contract_names_every_field_of_a_row() -> None:
    named = [field for first, *_ in rows(section(5)) for field in spans(first)]
    assert sorted(named) == sorted(RequestShown.__struct_fields__)


def test_the_contract_names_every_metered_route() -> None:
    named = section(3)
    assert all(f"`POST {endpoint.path}`" in named for endpoint in METERED)


def test_the_contract_names_every_admin_operation() -> None:
    named = {
        (role, operation)
        for role, operations in rows(section(8))[:4]
        for operation in spans(operations)
    }
    known = {
        (
            "key" if path.startswith("/me") else ADMITTED.get(each.min_rank, each.min_rank),
            f"{each.method} {path}",
        )
        for each in OPERATIONS
        for path in each.paths
    }
    assert named == known


# On a path that is not below /me, the least role that may use an operation for keys.
ADMITTED = {"key": "viewer"}


def test_every_metric_is_documented(gateway: Gateway, key: str) -> None:
    with gateway.client(key) as client:
        assert client.post("/responses", json={"model": "m", "input": "Hi"}).status_code
    shown = set(re.findall(r"^# TYPE (redbtc_\w+)", gateway.get("/metrics").text, re.MULTILINE))
    page = (DOCS / "operating.md").read_text().partition("## Metrics")[2]
    named = {
        span.partition("{")[0]
        for first, *_ in rows(page)
        for span in spans(first)
        if span.startswith("redbtc_")
    }
    assert named == shown


def test_tests_are_marked_with_the_promises_that_they_hold() -> None:
    """`pytest -m promise_3` runs the tests of the third promise."""
    table = (DOCS / "promises.md").read_text().partition("## Which tests hold them")[2]
    named: dict[str, set[str]] = {}
    for promise, tests in rows(table):
        number = promise.partition(".")[0]
        for file in spans(tests):
            named.setdefault(file, set()).update([number] if number.isdigit() else [])
    marked = {
        path.relative_to(TESTS).as_posix(): set(
            re.findall(r"pytest\.mark\.promise_(\d)", path.read_text())
        )
        for path in TESTS.rglob("test_*.py")
        if "node_modules" not in path.parts
    }
    marked["product/test_docs.py"] = set()  # which only speaks of them
    assert named == marked
