"""`pip install .` brings all files of the program, and the command finds them from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.gateway import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.process]

CONFIG = """
[[upstreams]]
name = "test"
base_url = "http://127.0.0.1:9/v1"
api_key_env = "TEST_UPSTREAM_KEY"
"""
SOURCES = ["redbtc_proxy.py", "pyproject.toml", "README.md"]
SHIPPED = ["schema.sql", "config.toml", "prices.toml", "deploy/terms.md", "deploy/privacy.md"]
SHIPPED += ["deploy/alerts.yml", "deploy/grafana.json"]


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "redbtc", source / "redbtc", ignore=compiled)
    (source / "deploy").mkdir()
    for name in [*SOURCES, *SHIPPED]:
        shutil.copy(ROOT / name, source / name)
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", folder)
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize("option", ["--prefix", "--target"])
def test_an_installed_command_finds_its_files(wheel: Path, tmp_path: Path, option: str) -> None:
    installed = tmp_path / "installed"
    pip("install", wheel, option, installed, "--ignore-installed")
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
    probe = f"import redbtc.config as c; print([c.shipped(each).read_text() for each in {SHIPPED}])"
    assert run("-c", probe) == f"{[(ROOT / each).read_text() for each in SHIPPED]}\n"
