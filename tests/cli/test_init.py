"""`init DIR` makes a folder to start a gateway from, and changes nothing that is there."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import redbtc_proxy  # noqa: F401 (adds all commands)
from redbtc.cli import program
from redbtc.cli.main import commands, main
from redbtc.config import load_settings
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, free_port, wait_until
from tests.helpers.upstream import Upstream


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, ["init", *map(str, arguments)])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_writes_the_shipped_files_for_the_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "gateway"
    before = os.umask(0)
    try:
        done = init(folder)
    finally:
        os.umask(before)
    assert done.exit_code == 0, done.output
    for name in ("config.toml", "prices.toml"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
        assert mode(folder / name) == 0o600
    assert mode(folder) == 0o700
    assert load_settings(str(folder / "config.toml")).database_path == folder / "redbtc.db"
    assert not (folder / "redbtc.db").exists(), "the ledger is made by the first start"


def test_it_says_what_to_do_next(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    found: dict[str, Any] = json.loads(init(folder, "--json").stdout)
    assert found["config"] == str(folder / "config.toml")
    assert found["prices"] == str(folder / "prices.toml")
    assert found["database"] == str(folder / "redbtc.db")
    assert found["variables"] == ["OPENAI_API_KEY"]
    assert found["dashboard"] == "http://127.0.0.1:8080/dashboard/"
    assert shlex.split(found["start"])[-4:] == [
        "--config",
        str(folder / "config.toml"),
        "serve",
        "--first-run",
    ]
    text = init(tmp_path / "other").stdout
    assert "OPENAI_API_KEY" in text
    assert "serve --first-run" in text
    assert "http://127.0.0.1:8080/dashboard/" in text


@pytest.mark.parametrize("name", ["config.toml", "prices.toml"])
@pytest.mark.parametrize("link", [False, True])
def test_it_never_overwrites(tmp_path: Path, name: str, link: bool) -> None:
    there = tmp_path / name
    if link:
        there.symlink_to(tmp_path / "nowhere")  # which would be written through
    else:
        there.write_text("mine")
    done = init(tmp_path, "--json")
    assert done.exit_code == 1
    assert str(done.exception) == (
        f"{there} exists already, and nothing was changed. Choose another folder, or move it away"
    )
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert link or there.read_text() == "mine"


def test_a_failure_leaves_no_half(tmp_path: Path) -> None:
    """If the second file can't be written, the first is removed, so that the command can be
    repeated."""
    (tmp_path / "file").write_text("")
    done = init(tmp_path / "file")
    assert done.exit_code == 1
    assert str(done.exception) == f"{tmp_path / 'file' / 'config.toml'}: Not a directory"
    limit = (ROOT / "prices.toml").stat().st_size - 1  # bytes; config.toml is smaller
    command = ["prlimit", f"--fsize={limit}", sys.executable, str(ROOT / "redbtc_proxy.py")]
    command += ["init", str(tmp_path / "new")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == f"Error: {tmp_path / 'new' / 'prices.toml'}: File too large\n"
    assert [*(tmp_path / "new").iterdir()] == []


@pytest.mark.process
def test_the_first_start_uses_what_it_wrote(tmp_path: Path, upstream: Upstream) -> None:
    """The first run imports the prices of the folder, which may have been edited, and prints
    commands that can be copied."""
    gateway = Gateway(tmp_path / "elsewhere", upstream.url, OPENAI_API_KEY="")
    gateway.config = tmp_path / "gateway" / "config.toml"
    assert json.loads(gateway.run("init", str(tmp_path / "gateway"), "--json").stdout)
    prices = tmp_path / "gateway" / "prices.toml"
    prices.write_text(prices.read_text().replace('"gpt-5.5"', '"renamed"'))
    gateway.port = free_port()
    gateway.url = f"http://127.0.0.1:{gateway.port}"
    try:
        gateway.start("--first-run", "--demo-if-no-key", "--port", str(gateway.port))
        wait_until(lambda: "Dashboard" in gateway.log())
        models = [each["model"] for each in gateway.cli("price", "list")["prices"]]
        assert "renamed" in models
        printed = gateway.log()
        assert "the demonstration upstream" in printed
        usage = next(line for line in printed.splitlines() if line.startswith("Show usage:"))
        assert shlex.split(usage)[-3:] == ["--config", str(gateway.config), "usage"]
    finally:
        gateway.close()


def test_a_key_that_is_lost_brings_no_demonstration(make_gateway: MakeGateway) -> None:
    """Clients would take canned answers for real ones, and pay for them."""
    gateway = make_gateway(TEST_UPSTREAM_KEY="").start("--demo-if-no-key")
    key = gateway.new_key()
    body = {"model": "redbtc-demo", "messages": [{"role": "user", "content": "Hi."}]}

    def status() -> int:
        with gateway.client(key) as client:
            return client.post("/chat/completions", json=body).status_code

    def restart_with(value: str) -> None:
        gateway.set_variable("TEST_UPSTREAM_KEY", value)
        gateway.terminate()
        gateway.start("--demo-if-no-key")

    assert status() == 200
    restart_with("")
    assert status() == 200, "only the demonstration has had a request"
    restart_with("sk-test")
    assert status() == 200
    assert {row["upstream"] for row in gateway.rows()} == {"demo", "test"}
    restart_with("")
    assert status() == 503


@pytest.mark.process
def test_a_key_in_the_environment_ends_the_demonstration(
    tmp_path: Path, upstream: Upstream
) -> None:
    gateway = Gateway(tmp_path, upstream.url)  # whose upstream has a key
    try:
        gateway.start("--first-run", "--demo-if-no-key")
        wait_until(lambda: "Dashboard" in gateway.log())
        assert f"Forwarding to: test ({upstream.url})" in gateway.log()
    finally:
        gateway.close()


def test_the_program_is_shown_as_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "bin" / "redbtc-proxy"
    installed.parent.mkdir()
    installed.write_text("#!/usr/bin/python3\n")
    installed.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(installed)])
    monkeypatch.chdir(ROOT)
    assert program.program_name() == str(installed)
    monkeypatch.setenv("PATH", str(installed.parent))
    assert program.program_name() == "redbtc-proxy"
    python = tmp_path / "bin" / "python3"
    python.symlink_to("/bin/true")
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr("sys.argv", ["redbtc_proxy.py"])
    assert program.program_name() == "python3 redbtc_proxy.py"
    monkeypatch.setattr("sys.argv", [f"{tmp_path}/a b.pyz"])
    assert program.program_name() == f"python3 '{tmp_path}/a b.pyz'"


def test_one_line_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text("mine")
    monkeypatch.setattr("sys.argv", ["redbtc-proxy", "init", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main(lambda _: None)  # type: ignore[arg-type, return-value]
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [["--config", "x", "check"], ["init", "x"]])
def test_a_removed_folder_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    monkeypatch.setattr("sys.argv", ["redbtc-proxy", *words])
    with pytest.raises(SystemExit) as ended:
        main(lambda _: None)  # type: ignore[arg-type, return-value]
    assert ended.value.code == 1
    said = "Error: the current folder was removed; change to another one\n"
    assert capsys.readouterr().err == said


def test_what_is_shown_in_a_removed_folder_has_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, program_file = tmp_path / "python3.x", tmp_path / "redbtc_proxy.py"
    python.touch()
    program_file.touch()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr("sys.argv", [str(program_file)])
    assert program.program_name() == f"{python} {program_file}"
