"""redbtc-proxy.pyz: one file that runs on every CPython from 3.11 on, and what it unpacks."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from packing.pyz import SHEBANG, VERSIONS, download
from tests.helpers.checkouts import make_checkout, run_module
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, USUAL, free_port, wait_until
from tests.helpers.reloading import Adopted, adopt_orphans

pytestmark = [pytest.mark.slow, pytest.mark.process]

SOURCE_DATE = 1_700_000_000
PROBE = (
    "import os, platform, sys; print(platform.python_implementation()); "
    "print(*sys.version_info[:2]); print(os.path.realpath(sys.executable))"
)
OLDEST = (3, 11)


def pythons() -> Iterator[tuple[tuple[int, int], str]]:
    """Yield the version and the path of each CPython on this machine."""
    folders = [Path(each) for each in os.environ["PATH"].split(":")]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    folders += [each / "bin" for each in versions.glob("*")] + [Path("/usr/bin")]
    for path in {path for folder in folders for path in folder.glob("python[23]*")}:
        if re.fullmatch(r"python[23](\.\d+)?", path.name) and os.access(path, os.X_OK):
            done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.startswith("CPython"):
                _, version, real = done.stdout.splitlines()
                major, minor = map(int, version.split())
                yield (major, minor), real


PYTHONS = sorted(set(pythons()))
NEW = [path for version, path in PYTHONS if version >= OLDEST]
OLD = [path for version, path in PYTHONS if version < OLDEST]


def build(checkout: Path, wheels: Path, umask: int) -> Path:
    file = checkout.parent / "redbtc-proxy.pyz"
    machine = ["--machine", platform.machine()]
    run_module(checkout, "packing.pyz", file, "--wheels", wheels, *machine, umask=umask)
    return file


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the downloaded wheels. Without a network, tests are skipped, or fail where CI
    is set."""
    folder = tmp_path_factory.mktemp("wheels")
    try:
        for version in VERSIONS:
            download(version, platform.machine(), folder)
    except SystemExit as error:
        if os.environ.get("CI"):
            raise AssertionError(error) from error
        pytest.skip(f"packages can't be downloaded: {error}")
    return folder


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    folder = tmp_path_factory.mktemp("pyz")
    return build(make_checkout(folder / "a", 0o022, SOURCE_DATE), wheels, 0o022)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def run(pyz: Path, cache: Path, tmp_path: Path) -> Run:
    """Runs the file in a folder of its own, with no environment but the cache."""

    def run_pyz(
        *words: str | Path, python: str = NEW[0], file: Path = pyz, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, file, *words],
            env={"PATH": os.environ["PATH"], "REDBTC_CACHE": str(cache), **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    return run_pyz


def unpacked(cache: Path) -> list[Path]:
    """The folders of builds."""
    return sorted(path for path in (cache / "redbtc-proxy").iterdir() if path.is_dir())


def another_build(pyz: Path, target: Path, digest: str = "0" * 64, builds: str = "") -> Path:
    """Write a copy of the file that says that it is another build, or for other builds only."""
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "contents.json":
                contents = json.loads(content) | {"digest": digest}
                if builds:
                    contents["builds"] = {builds: contents["builds"].popitem()[1]}
                content = json.dumps(contents).encode()
            new.writestr(name, content)
    return target


# ── Every Python ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("python", NEW)
def test_it_serves_on_every_python(python: str, run: Run, pyz: Path, tmp_path: Path) -> None:
    """`init` makes settings with which it serves; the demonstration answers a request."""
    done = run("init", "gateway", python=python)
    assert done.returncode == 0, done.stderr
    port = free_port()
    command = [
        python,
        str(pyz),
        "--config",
        "gateway/config.toml",
        "serve",
        "--first-run",
        "--demo",
    ]
    env = {"PATH": os.environ["PATH"], "REDBTC_CACHE": str(tmp_path / "cache")}
    adopt_orphans()
    log, new = tmp_path / "log", None
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=tmp_path, env=env, stdout=file, stderr=file
        )
    try:
        wait_until(lambda: "Dashboard" in log.read_text() or process.poll(), why=log.read_text)
        (key,) = re.findall(r"^API key    (\S+)", log.read_text(), re.MULTILINE)
        answer = httpx2.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={"model": "redbtc-demo", "messages": [{"role": "user", "content": "Hello."}]},
            headers={"authorization": f"Bearer {key}"},
            **USUAL,
        )
        assert answer.status_code == 200, answer.text
        login = httpx2.get(f"http://127.0.0.1:{port}/dashboard/login", **USUAL)
        assert login.status_code == 200, "templates are found"
        usage = run("--config", "gateway/config.toml", "usage", "--json", python=python)
        assert [row["status"] for row in json.loads(usage.stdout)["requests"]] == [200]
        done = run("--config", "gateway/config.toml", "reload", "--json", python=python)
        assert done.returncode == 0, done.stderr
        new = Adopted(json.loads(done.stdout)["pid"])
        assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
        usage = run("--config", "gateway/config.toml", "usage", "--json", python=python)
        assert usage.returncode == 0, "the socket for commands is there"
    finally:
        process.kill()
        if new:
            new.terminate()
            assert new.wait() == 0
    assert (tmp_path / "gateway" / "redbtc.db").exists()


@pytest.mark.skipif(not OLD, reason="this machine has no older Python")
@pytest.mark.parametrize("python", OLD)
def test_an_older_python_says_what_is_wrong(python: str, run: Run, pyz: Path, cache: Path) -> None:
    done = run("--help", python=python)
    assert done.returncode == 1
    expected = r"Error: redbtc-proxy needs Python 3\.11 or newer; \S+ is Python \d\.\d+\. Run it "
    assert re.fullmatch(rf"{expected}with a newer one: python3\.11 {pyz}\n", done.stderr)
    assert not cache.exists()


def test_another_platform_is_named(run: Run, pyz: Path, tmp_path: Path, cache: Path) -> None:
    other = another_build(pyz, tmp_path / "other.pyz", builds=".cpython-399-riscv64-linux-gnu.so")
    done = run("--help", file=other)
    assert done.returncode == 1
    assert re.fullmatch(
        r"Error: this is CPython 3\.\d+ on linux \S+ \(\.cpython-\S+\.so\); other\.pyz is for "
        r"CPython 3\.11, .*glibc.*\. Elsewhere, install the package with pipx\n",
        done.stderr,
    )
    assert not cache.exists()


def test_two_builds_are_the_same_to_the_byte(pyz: Path, wheels: Path, tmp_path: Path) -> None:
    """Another folder, other modes, other dates of the files, at another time."""
    again = build(make_checkout(tmp_path / "b" / "name", 0o077, 1_600_000_000), wheels, 0o077)
    assert again.read_bytes() == pyz.read_bytes()
    assert pyz.read_bytes().startswith(SHEBANG)
    assert pyz.stat().st_mode & 0o111


# ── What it unpacks ──────────────────────────────────────────────────────────────────────────────


def test_only_the_user_can_change_what_it_unpacks(run: Run, cache: Path) -> None:
    before = os.umask(0)
    try:
        assert run("--help").returncode == 0
    finally:
        os.umask(before)
    for path in (cache / "redbtc-proxy").rglob("*.[!p]*"):  # Python itself makes *.pyc
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert stat.S_IMODE((cache / "redbtc-proxy").stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_to_is_refused(run: Run, cache: Path) -> None:
    there = cache / "redbtc-proxy"
    there.mkdir(parents=True)
    there.chmod(0o777)
    done = run("--help")
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"Error: {there} belongs to user {os.geteuid()} and has mode 0777;"
    )
    assert done.stderr.count("\n") == 1
    there.rmdir()
    (cache / "target").mkdir()
    there.symlink_to(cache / "target")
    done = run("--help")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {there} is not a folder.")
    assert not [*(cache / "target").iterdir()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_another_user_is_refused(run: Run, cache: Path) -> None:
    there = cache / "redbtc-proxy"
    there.mkdir(parents=True, mode=0o700)
    os.chown(there, 12345, 12345)
    done = run("--help")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {there} belongs to user 12345 and has mode 0700;")


def test_where_nothing_can_be_written_it_says_so(run: Run) -> None:
    done = run("--help", REDBTC_CACHE="/proc/self")
    assert done.returncode == 1
    assert done.stderr == (
        "Error: can't unpack into /proc/self/redbtc-proxy: No such file or directory. "
        "Set REDBTC_CACHE to a folder that only this user may write to\n"
    )


def test_a_read_only_folder_that_has_it_is_enough(run: Run, cache: Path) -> None:
    """As in an image, or a home folder that is mounted read-only after the first start."""
    assert run("--help").returncode == 0
    script = f'mount --bind -o ro "{cache}" "{cache}" && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("mounts can't be made here")
    done = subprocess.run(
        [*inside, *run("--help").args], env={"REDBTC_CACHE": str(cache)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_the_cache_is_where_users_expect_it(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert run("--help", REDBTC_CACHE="", HOME=str(home)).returncode == 0
    assert (home / ".cache" / "redbtc-proxy").is_dir()
    assert run("--help", REDBTC_CACHE="", XDG_CACHE_HOME=str(tmp_path / "xdg")).returncode == 0
    assert (tmp_path / "xdg" / "redbtc-proxy").is_dir()


def test_starts_at_the_same_time_unpack_once(run: Run, pyz: Path, cache: Path) -> None:
    """An inode would be another one if the folder had been replaced."""
    env = {"PATH": os.environ["PATH"], "REDBTC_CACHE": str(cache)}
    started = [
        subprocess.Popen([NEW[0], pyz, "--help"], env=env, stdout=subprocess.PIPE) for _ in range(4)
    ]
    wait_until(lambda: (cache / "redbtc-proxy").is_dir() and any(map(is_whole, unpacked(cache))))
    (folder,) = unpacked(cache)
    inode = folder.stat().st_ino
    for each in started:
        assert b"Usage: redbtc-proxy" in each.communicate()[0]
        assert each.returncode == 0
    assert unpacked(cache) == [folder]
    assert folder.stat().st_ino == inode


def is_whole(folder: Path) -> bool:
    return not folder.name.endswith(".partial")


def test_an_interrupted_start_is_repeated(run: Run, pyz: Path, cache: Path) -> None:
    env = {"PATH": os.environ["PATH"], "REDBTC_CACHE": str(cache)}
    process = subprocess.Popen([NEW[0], pyz, "--help"], env=env)
    wait_until(lambda: any(cache.glob("*/*.partial/*")) or process.poll() is not None)
    process.kill()
    process.wait()
    (partial,) = unpacked(cache)
    assert not is_whole(partial), "it was killed before it had unpacked all"
    (partial / "left-behind").touch()
    assert run("--help").returncode == 0
    (folder,) = unpacked(cache)
    assert is_whole(folder)
    assert not (folder / "left-behind").exists()


@pytest.mark.parametrize("damage", ["cut", "removed", "no list"])
def test_files_that_are_missing_are_unpacked_again(run: Run, cache: Path, damage: str) -> None:
    """As after a loss of power, or where a program cleans caches."""
    assert run("--help").returncode == 0
    (folder,) = unpacked(cache)
    if damage == "cut":
        (folder / "redbtc" / "cli" / "main.py").write_text("")
    elif damage == "removed":
        (folder / "share" / "redbtc-proxy" / "schema.sql").unlink()
    else:
        (folder / "sizes.json").write_text("")
        (folder / "redbtc_proxy.py").unlink()
    done = run("account", "list")
    assert done.returncode == 0, done.stderr
    assert unpacked(cache) == [folder]


@contextmanager
def used(pyz: Path, cache: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a gateway from the file."""
    with subprocess.Popen(
        [NEW[0], pyz, "serve", "--demo", "--port", "0", "--json"],
        env={"PATH": os.environ["PATH"], "REDBTC_CACHE": str(cache)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as program:
        try:
            assert program.stdout
            assert b"{" in program.stdout.readline()
            yield program
        finally:
            program.kill()


def test_a_new_build_removes_old_ones_that_are_not_used(
    run: Run, pyz: Path, cache: Path, tmp_path: Path
) -> None:
    assert run("--help").returncode == 0
    with used(pyz, cache, tmp_path):
        (first,) = unpacked(cache)
        second = another_build(pyz, tmp_path / "second.pyz", "2" * 64)
        assert run("--help", file=second).returncode == 0
        assert len(unpacked(cache)) == 2
        assert first in unpacked(cache), "it is used"
    third = another_build(pyz, tmp_path / "third.pyz", "3" * 64)
    assert run("--help", file=third).returncode == 0
    (folder,) = unpacked(cache)
    assert "3333" in folder.name


def test_a_used_folder_that_lacks_files_is_named(
    run: Run, pyz: Path, cache: Path, tmp_path: Path
) -> None:
    """The folder can't be replaced under a program that runs from it."""
    with used(pyz, cache, tmp_path) as program:
        (folder,) = unpacked(cache)
        (folder / "redbtc" / "money.py").unlink()
        done = run("--help")
        assert done.returncode == 1
        assert "lacks files, and a program that runs from it does not end" in done.stderr
        assert program.poll() is None
    assert run("--help").returncode == 0, "unpacked again"


def test_settings_beside_the_file_are_used(run: Run, pyz: Path, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    file = Path(shutil.copy(pyz, folder))
    (folder / "config.toml").write_text("[server]\nport = 70000\n")
    done = run("account", "list", file=file)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {folder / 'config.toml'}: server.port: found 70000")
    (folder / "config.toml").write_text('[database]\npath = "here.db"\n')
    assert run("account", "add", "a", file=file).returncode == 0
    assert (folder / "here.db").exists()


def test_the_lock_is_no_standard_descriptor(tmp_path: Path) -> None:
    """If those are closed, the lock must not become the program's standard error."""
    probe = (
        "import os, pathlib, sys; from packing.pyz_unpack import open_lock; "
        f"os._exit(open_lock(pathlib.Path({str(tmp_path / 'folder')!r})))"
    )
    script = 'exec "$@" <&- >&- 2>&-'
    command = ["sh", "-c", script, "sh", NEW[0], "-c", probe]
    assert subprocess.run(command, cwd=ROOT).returncode > 2
