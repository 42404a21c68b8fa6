"""Build redbtc-proxy.pyz, one file with the program and all that it needs: `make pyz`.

    python -m packing.pyz [FILE] [--wheels FOLDER]

The packages are those of requirements.lock, and pip checks their hashes. An extension module is for
one version of Python on one platform, so the archive has those for each; `pyz_unpack.py` takes the
right ones. The same source gives the same bytes. Downloaded wheels stay in FOLDER, if it is given.

    __main__.py  packing/  what Python runs
    contents.json          which wheels are for which Python
    wheels/                the program's wheel, and those of its packages as they were published
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from packing.dist import build
from packing.source import ROOT, source_date

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
MANYLINUX = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
SUPPORTS = (
    f"CPython {', '.join(VERSIONS[:-1])} and {VERSIONS[-1]} on Linux with glibc 2.28 or newer "
    f"({', '.join(MACHINES)})"
)
PACKING = ROOT / "packing"
SHEBANG = b"#!/usr/bin/env python3\n"


def requirements(version: str) -> list[str]:
    """Return the lines of requirements.lock that a version of Python needs, with their hashes."""
    lines = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "sys_platform": "linux",
    }
    pinned = [line for line in lines if line[:1].isalnum()]
    markers = [Requirement(line.partition(" --hash")[0]).marker for line in pinned]
    return [
        line
        for line, marker in zip(pinned, markers, strict=True)
        if marker is None or marker.evaluate(environment)
    ]


def download(version: str, machine: str, folder: Path) -> list[Path]:
    """Return the wheels for a version of Python on a kind of machine, which are downloaded if the
    folder is new."""
    target = folder / f"cp{version.replace('.', '')}-{machine}"
    if not target.exists():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(requirements(version)))
            file.flush()
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--require-hashes", "--only-binary=:all:", "--requirement", file.name]
            command += ["--implementation", "cp", "--python-version", version]
            command += [word for each in MANYLINUX for word in ("--platform", f"{each}_{machine}")]
            partial = target.with_suffix(".partial")
            command += ["--dest", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"Error: pip failed: {done.stderr}")
        partial.rename(target)
    return sorted(target.glob("*.whl"))


def packed(files: dict[str, bytes], date: int) -> bytes:
    """Return an archive that can be executed. Its bytes depend only on the files and the date."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: wheels are compressed already
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, time.gmtime(date)[:6])
            entry.create_system = 3  # Unix
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def pyz(program: Path, builds: dict[str, list[Path]], date: int) -> bytes:
    """Return the archive with the program's wheel and, for each build, the wheels that it needs."""
    wheels = {each.name: each.read_bytes() for build in builds.values() for each in build}
    wheels[program.name] = program.read_bytes()
    digest = hashlib.sha256(
        b"".join(hashlib.sha256(wheels[name]).digest() for name in sorted(wheels))
    )
    contents = {
        "version": program.name.split("-")[1],
        "digest": digest.hexdigest(),
        "supports": SUPPORTS,
        "builds": {
            suffix_of(name): [program.name, *(each.name for each in build)]
            for name, build in builds.items()
        },
    }
    return packed(
        {
            "__main__.py": (PACKING / "pyz_main.py").read_bytes(),
            "packing/__init__.py": b"",
            "packing/pyz_unpack.py": (PACKING / "pyz_unpack.py").read_bytes(),
            "contents.json": json.dumps(contents, indent=1).encode(),
            **{f"wheels/{name}": content for name, content in wheels.items()},
        },
        date,
    )


def suffix_of(build: str) -> str:
    """Return the ending of extension modules of a build, by which Python knows its own."""
    python, _, machine = build.partition("-")
    return f".cpython-{python[2:]}-{machine}-linux-gnu.so"


def main() -> None:
    """Build the file that the command line names, else dist/redbtc-proxy.pyz."""
    parser = argparse.ArgumentParser(description="Build redbtc-proxy.pyz.")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "dist" / "redbtc-proxy.pyz")
    parser.add_argument("--wheels", type=Path, help="keep the downloaded wheels here")
    parser.add_argument("--machine", action="append", help="build only for this kind of machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="redbtc-pyz-") as temporary:
        folder = options.wheels or Path(temporary, "wheels")
        builds = {
            f"cp{version.replace('.', '')}-{machine}": download(version, machine, folder)
            for machine in options.machine or MACHINES
            for version in VERSIONS
        }
        (program,) = build(Path(temporary, "dist"), "wheel")
        content = pyz(program, builds, source_date(ROOT))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_bytes(content)
    options.file.chmod(0o755)
    print(options.file)


if __name__ == "__main__":
    main()
