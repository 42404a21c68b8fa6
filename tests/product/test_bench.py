"""`make bench` runs: what the README and docs quote can be repeated."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.gateway import ROOT
from tests.helpers.tools import needs

pytestmark = pytest.mark.slow


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_the_benchmark_measures_all_but_litellm() -> None:
    needs("nginx")
    short = ["--rows", "1000", "--no-litellm", "--rounds", "1", "--seconds", "0.1"]
    command = [sys.executable, str(ROOT / "bench" / "bench.py"), *short]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for figure in ("start to first answer", "1000 streams: CPU", "CPU a JSON request", "statement"):
        (line,) = [line for line in done.stdout.splitlines() if figure in line]
        assert any(character.isdigit() for character in line.partition(")")[2]), line


def test_the_benchmark_of_backups() -> None:
    short = ["--rows", "1000", "--seconds", "0.1"]
    command = [sys.executable, str(ROOT / "bench" / "backup.py"), *short]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for figure in ("db backup", "db restore", "requests, during backups"):
        assert figure in done.stdout
