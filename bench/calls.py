#!/usr/bin/env python3
"""Count the function calls that a JSON request costs the gateway, C functions included: a figure
that does not depend on the machine's speed.

    bench/calls.py [CHECKOUT ...]

runs the gateway of this checkout, or of each CHECKOUT, in front of the tests' upstream.
"""

from __future__ import annotations

import pstats
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from gateway import Gateway, wait_until  # noqa: E402
from upstream import Upstream  # noqa: E402

FEW, MANY = 200, 1200
BODY = {"model": "gpt-up", "input": "Hi"}


class Profiled(Gateway):
    """A gateway that is run under cProfile."""

    def command(self, *arguments: str) -> list[str]:
        python, script, *rest = super().command(*arguments)
        if "serve" not in arguments:
            return [python, script, *rest]
        return [python, "-m", "cProfile", "-o", str(self.folder / "profile"), script, *rest]


def calls(root: Path, requests: int) -> int:
    """Return how many calls a gateway makes from start to end, serving `requests` requests."""
    with tempfile.TemporaryDirectory() as folder, Upstream() as upstream:
        gateway = Profiled(Path(folder), upstream.url, root=root).start()
        key = gateway.new_key()
        with gateway.client(key) as client:
            for _ in range(requests):
                assert client.post("/responses", json=BODY).status_code == 200
        gateway.terminate()
        wait_until((Path(folder) / "profile").exists)
        profile: Any = pstats.Stats(str(Path(folder) / "profile"))
        return int(profile.total_calls)


def main() -> None:
    """Print a line for each checkout."""
    for root in [Path(each) for each in sys.argv[1:]] or [ROOT]:
        few, many = (calls(root, number) for number in (FEW, MANY))
        print(f"{root}: {(many - few) / (MANY - FEW):.1f} calls a request")


if __name__ == "__main__":
    main()
