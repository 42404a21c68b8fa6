"""`pip install .` brings all files of the program, and the command finds them from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from packing.dist import build
from tests.helpers.gateway import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.process]

CONFIG = """
[[upstreams]]
name = "test"
base_url = "http://127.0.0.1:9/v1"
api_key_env = "TEST_UPSTREAM_KEY"
"""
SHIPPED = ["schema.sql", "config.toml", "prices.toml", "deploy/terms.md", "deploy/privacy.md"]
SHIPPED += ["deploy/alerts.yml", "deploy/grafana.json"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (built,) = build(tmp_path_factory.mktemp("wheel"), "wheel")
    return built


@pytest.mark.parametrize("option", ["--prefix", "--target"])
def test_an_installed_command_finds_its_files(wheel: Path, tmp_path: Path, option: str) -> None:
    installed = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    install += [option, str(installed), "--ignore-installed"]
    pip = subprocess.run(install, capture_output=True, text=True)
    assert pip.returncode == 0, pip.stderr
    (packages,) = [path.parent for path in installed.rglob("redbtc_proxy.py")]
    (tmp_path / "config.toml").write_text(CONFIG)
    env = {**os.environ, "PYTHONPATH": str(packages), "TEST_UPSTREAM_KEY": "sk-test"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=env
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = installed / "bin" / "redbtc-proxy"
    run(script, "account", "add", "test")  # makes the database from schema.sql
    assert "test" in run(script, "account", "list")
    run(script, "init", "made")
    assert (tmp_path / "made" / "config.toml").read_bytes() == (ROOT / "config.toml").read_bytes()
    probe = f"import redbtc.config as c; print([c.shipped(each).read_text() for each in {SHIPPED}])"
    assert run("-c", probe) == f"{[(ROOT / each).read_text() for each in SHIPPED]}\n"
