"""Build the sdist and the wheel into a folder: `make dist`.

    python -m packing.dist [FOLDER]

The same source gives the same bytes: hatchling packs the files in a fixed order, with the modes of
a checkout and the date of the last commit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from packing.source import ROOT, exported, source_date


def build(folder: Path, *targets: str) -> list[Path]:
    """Build `sdist`, `wheel` or both into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(source_date(ROOT))}
    with exported(ROOT) as source:
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(source.parent / "built")]
        command += [word for target in targets for word in ("-t", target)]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"Error: hatchling failed: {done.stderr}")
        built = sorted((source.parent / "built").iterdir())
        return [Path(shutil.copy(path, folder)) for path in built]


def main() -> None:
    """Build both into the folder that the command line names, else into dist/."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
    for path in build(folder, "sdist", "wheel"):
        print(path)


if __name__ == "__main__":
    main()
