"""`make bench` runs: what the README and docs quote can be repeated."""

from __future__ import annotations

import os
import re
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


def test_the_benchmark_of_reloads() -> None:
    command = [sys.executable, str(ROOT / "bench" / "reload.py"), "--reloads", "2"]
    done = subprocess.run([*command, "--clients", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = dict(re.findall(r"^(.*?)  +(\d+)$", done.stdout, re.MULTILINE))
    assert figures["refused, torn or not answered"] == figures["responses with two rows"] == "0"
    assert figures["rows in the ledger"] == figures["answers that the upstream gave"]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="counted with Python 3.11")
def test_a_request_and_an_event_cost_no_more_function_calls() -> None:
    """A change that raises a figure raises it here, too, and says why in docs/measurements.md."""
    command = [sys.executable, str(ROOT / "bench" / "calls.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r".*: ([\d.]+) calls a JSON chat, ([\d.]+) an event\n", done.stdout)
    assert found, done.stdout
    request, event = map(float, found.groups())
    assert request < 944, "a JSON chat took 934 on 2026-11-30; runs differ by about 1 %"
    assert event < 22, "an event took 21.6 on 2026-11-29"
