"""The export of an account: all of it, nobody else's, no secret; interrupted at any time."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bench.bench import fill
from redbtc.admin.api_export import CONTENT_AT_ONCE
from tests.helpers.gateway import ROOT, RUN, Gateway, MakeGateway, wait_until
from tests.helpers.logins import Login, anonymous, new_user
from tests.helpers.speed import Stalls, calmest

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_7]

BODY = b'{"model": "m",\n "input": "\xc3\xa9 \\u00e9"}'
ANSWER = bytes(range(256)) * 100
# What is stored of requests, as a file says: by request id, the account, both bodies in base64
# (null: none), and whether they are complete.
WITH_CONTENT = """
import base64, json, sys
sys.path.insert(0, {root!r})
from redbtc.store.request_log import LoggedRequest, RequestLog
def stored():
    with open({file!r}) as file:
        return json.load(file)
async def ids_of(self, account_id):
    return [each for each, (account, *_) in stored().items() if account == account_id]
async def read(self, request_id):
    if request_id not in stored():
        return None
    account, request, response, is_complete = stored()[request_id]
    bodies = [None if each is None else base64.b64decode(each) for each in (request, response)]
    sizes = [len(each or b"") for each in bodies]
    times, withheld = (1, 2), (False, False)
    return LoggedRequest(
        request_id, account, "key_0", *times, *bodies, *sizes, "", "", *withheld, is_complete
    )
RequestLog.ids_of, RequestLog.read = ids_of, read
"""


@pytest.fixture
def closing() -> Iterator[Callable[[Login], Login]]:
    with contextlib.ExitStack() as stack:

        def keep(login: Login) -> Login:
            stack.callback(login.client.close)
            return login

        yield keep


def store_content(gateway: Gateway, content: dict[str, tuple[str, Any, Any, bool]]) -> None:
    """Let the gateway, which is not started yet, find this stored of requests."""
    file = gateway.folder / "content.json"
    found = {
        request_id: [
            account,
            *(base64.b64encode(each).decode() if each is not None else None for each in bodies),
            whole,
        ]
        for request_id, (account, *bodies, whole) in content.items()
    }
    file.write_text(json.dumps(found))
    gateway.prelude = WITH_CONTENT.format(root=str(ROOT), file=str(file))


def request_id(number: int) -> str:
    return f"req_{number:032x}"


def files_in(archive: bytes | Path) -> dict[str, bytes]:
    """Return the files of an archive, each of which is as the manifest says."""
    source = io.BytesIO(archive) if isinstance(archive, bytes) else archive
    with zipfile.ZipFile(source) as opened:
        assert opened.testzip() is None
        files = {name: opened.read(name) for name in opened.namelist()}
        assert len(files) == len(opened.namelist())
        assert {entry.external_attr >> 16 for entry in opened.infolist()} == {0o600}
    listed = json.loads(files["manifest.json"])["files"]
    assert [each["name"] for each in listed] == list(files)[:-1]
    for each in listed:
        content = files[each["name"]]
        assert each["bytes"] == len(content)
        assert each["sha256"] == hashlib.sha256(content).hexdigest()
    return files


def leftovers(gateway: Gateway) -> list[str]:
    return [each.name for each in gateway.folder.iterdir() if ".partial" in each.name]


def export(gateway: Gateway, account: str = "a", file: str = "a.zip") -> dict[str, bytes]:
    """Return the files of an export by the command."""
    path = gateway.folder / file
    path.unlink(missing_ok=True)
    done = gateway.cli("account", "export", account, "--to", str(path))
    files = files_in(path)
    content = path.read_bytes()
    facts = (done["bytes"], done["sha256"], done["files"])
    assert facts == (len(content), hashlib.sha256(content).hexdigest(), len(files))
    assert (done["path"], path.stat().st_mode & 0o777) == (str(path), 0o600)
    assert leftovers(gateway) == []
    return files


def rows_of(files: dict[str, bytes], name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(files[name].decode(), newline="")))


# ── What is in it ────────────────────────────────────────────────────────────────────────────────


def populated(gateway: Gateway) -> tuple[dict[str, Any], list[str]]:
    """Let an account `a` have something of everything, and `b` as well. Return `a` with its id,
    and all secrets."""
    secrets = []
    gateway.api("POST", "/prices", {"prices": [{"model": "gpt-*", "input": "1", "output": "2"}]})
    for name in ("a", "b"):
        gateway.api("POST", "/accounts", {"name": name, "email": f"{name}-contact@example.com"})
        for label in (f"=HYPERLINK({name})", f"label of {name}"):
            key = gateway.api("POST", f"/accounts/{name}/keys", {"label": label, "models": "g*,m"})
            secrets.append(key["key"])
            with gateway.client(key["key"]) as client:
                for model in ("gpt-5.5", "gpt-5.4"):
                    client.post("/responses", json={"model": model, "input": "x"})
        payment = {"amount": "12.50", "reference": f"+ref-{name}"}
        gateway.api("POST", f"/accounts/{name}/payments", payment)
        gateway.api("POST", f"/accounts/{name}/suspend", {"reason": f"secret reason {name}"})
        gateway.api("POST", f"/accounts/{name}/resume")
        link = gateway.api(
            "POST", "/users", {"email": f"viewer@{name}.org", "role": "viewer", "account": name}
        )["link"]
        secrets.append(link.rpartition("/")[2])
    gateway.api("POST", "/notices", {"kind": "incident", "text": "@down for all"})
    past = {"kind": "incident", "text": "over", "effective": "2026-01-01", "until": "2026-01-02"}
    gateway.api("POST", "/notices", past)
    withdrawn = gateway.api("POST", "/notices", {"kind": "incident", "text": "a mistake"})
    gateway.api("POST", f"/notices/{withdrawn['id']}/withdraw")
    found: dict[str, Any] = gateway.api("GET", "/accounts/a")
    return found, secrets


@pytest.mark.front_door
def test_an_export_is_what_the_api_says(
    make_gateway: MakeGateway, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway()
    gateway.start()
    account, secrets = populated(gateway)
    owner = closing(new_user(gateway, "owner@a.org", "owner", "a"))
    cookie = owner.client.cookies["redbtc"]
    files = export(gateway)
    found = {name: json.loads(content) for name, content in files.items() if name[-5:] == ".json"}
    path = f"/accounts/{account['id']}"
    assert found["account.json"] == owner.get(f"/admin/v1{path}").json()
    assert found["logins.json"]["logins"] == owner.get("/admin/v1/users").json()["users"]
    for name in ("keys", "payments"):
        assert found[f"{name}.json"] == owner.get(f"/admin/v1{path}/{name}").json()
    notices = found["notices.json"]["notices"]
    current = owner.get(f"/admin/v1{path}/notices").json()["notices"]
    assert [each["text"] for each in notices] == ["@down for all", "over"]
    assert [each for each in notices if each["text"] != "over"] == current
    month = account["month"]
    statement = gateway.cli("statement", "a", month)
    assert found[f"statements/{month}.json"] == statement
    printed = gateway.run("statement", "a", month, "--csv").stdout
    assert files[f"statements/{month}.csv"].decode() == printed.replace("\n", "\r\n")
    rows = gateway.rows(account="a")
    assert found[f"usage/{month}.json"]["requests"] == rows
    printed = gateway.run("usage", "--account", "a", "--csv").stdout
    assert files[f"usage/{month}.csv"].decode() == printed.replace("\n", "\r\n")
    assert len(rows) == 4
    sums = owner.get("/admin/v1/usage?group_by=day,model").json()
    assert found["usage-by-day.json"] == sums
    assert [row["cost"] for row in rows_of(files, "usage-by-day.csv")] == [
        each["cost"] for each in sums["groups"]
    ]
    changes = {each["id"]: each for each in gateway.api("GET", "/changes", account="a")["changes"]}
    exported = found["changes.json"]["changes"]
    assert [each["id"] for each in exported] == list(changes)
    for each in exported:
        whole = changes[each["id"]]
        assert each["object_id"] == whole["object_id"]
        assert each["changed_by"] == (
            "operator" if "@" not in whole["changed_by"] else whole["changed_by"]
        )
        for side in ("before", "after"):
            shown = whole[side] and {k: v for k, v in whole[side].items() if k != "status_reason"}
            assert each[side] == shown
    assert found["acceptances.json"] == {"acceptances": []}
    # A spreadsheet takes nothing for a formula.
    assert rows_of(files, "keys.csv")[0]["label"] == "'=HYPERLINK(a)"
    assert rows_of(files, "keys.csv")[0]["models"] == "g*,m"
    assert rows_of(files, "payments.csv")[0]["reference"] == "'+ref-a"
    assert rows_of(files, "notices.csv")[0]["text"] == "'@down for all"
    manifest = found["manifest.json"]
    assert (manifest["account"], manifest["account_id"]) == ("a", account["id"])
    assert manifest["with_content"]
    assert_nothing_secret(gateway, files, [*secrets, cookie, "secret reason"])
    for text in ("b-contact", "label of b", "HYPERLINK(b)", "ref-b", "viewer@b.org"):
        assert not any(text.encode() in content for content in files.values()), text


def assert_nothing_secret(gateway: Gateway, files: dict[str, bytes], secrets: list[str]) -> None:
    """Look for these, and for all secrets in the database, in each file."""
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        values = [text.encode() for text in secrets]
        for table in ("keys", "users", "sessions", "secrets"):
            for row in database.execute(f"SELECT * FROM {table}"):
                values += [each for each in row if isinstance(each, bytes)]
        values += [each.encode() for (each,) in database.execute("SELECT id FROM sessions")]
    assert len(values) > len(secrets) + 8
    for value in values:
        forms = {
            value,
            value.hex().encode(),
            value.hex().upper().encode(),
            base64.b64encode(value),
            base64.urlsafe_b64encode(value).rstrip(b"="),
        }
        for name, content in files.items():
            assert not any(form in content for form in forms), name


def test_stored_content_is_exported_exactly(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.cli("account", "add", "a")
    own = gateway.cli("account", "show", "a")["id"]
    many = {request_id(number): (own, b"%d" % number, None, True) for number in range(1000, 1130)}
    assert len(many) > CONTENT_AT_ONCE
    store_content(
        gateway,
        {
            request_id(1): (own, BODY, ANSWER, True),
            request_id(2): (own, BODY, ANSWER[:1000], False),
            request_id(3): (own, b"", b"", True),
            **many,
            request_id(9): ("acct_0123456789abcdef", b"theirs", b"theirs", True),
        },
    )
    gateway.start()
    files = export(gateway)
    content = {name: data for name, data in files.items() if name.startswith("content/")}
    assert content.pop(f"content/{request_id(2)}.incomplete.txt")
    assert content == {
        f"content/{request_id(1)}.request": BODY,
        f"content/{request_id(1)}.response": ANSWER,
        f"content/{request_id(2)}.request": BODY,
        f"content/{request_id(2)}.response": ANSWER[:1000],
        f"content/{request_id(3)}.request": b"",
        f"content/{request_id(3)}.response": b"",
        **{f"content/{each}.request": body for each, (_, body, *_) in many.items()},
    }
    noted = [
        each for each in gateway.api("GET", "/changes")["changes"] if each["kind"] == "request_log"
    ]
    assert len(noted) == 1  # for two parts
    assert (noted[0]["object_id"], noted[0]["account"]) == (own, "a")
    assert noted[0]["after"] == {"exported_as_of": json.loads(files["manifest.json"])["as_of"]}
    # Whoever names another account's request gets nothing of it.
    transport = httpx2.HTTPTransport(uds=f"{gateway.database}.sock")
    with httpx2.Client(transport=transport, base_url="http://gateway/admin/v1") as client:
        query = {"as_of": "1s", "requests": f"{request_id(1)},{request_id(9)}"}
        answer = client.get("/accounts/a/export/content", params=query)
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.namelist() == [
                f"content/{request_id(1)}.{kind}" for kind in ("request", "response")
            ]
        for part, status in (("..%2fcontent", 404), ("usage-2026-13", 404), ("usage-", 404)):
            assert client.get(f"/accounts/a/export/{part}?as_of=1s").status_code == status
        for query in ({"as_of": "1s", "requests": "req_1"}, {"as_of": "2999-01-01"}):
            assert client.get("/accounts/a/export/content", params=query).status_code == 400


# ── Who may have it ──────────────────────────────────────────────────────────────────────────────


def test_who_may_export(make_gateway: MakeGateway, closing: Callable[[Login], Login]) -> None:
    gateway = make_gateway()
    ids = {}
    for name in ("a", "b"):
        gateway.cli("account", "add", name)
        ids[name] = gateway.cli("account", "show", name)["id"]
    store_content(
        gateway,
        {request_id(number): (ids[name], BODY, ANSWER, True) for number, name in enumerate("ab")},
    )
    gateway.start()
    operator = closing(new_user(gateway, "op@example.com"))
    owner = closing(new_user(gateway, "owner@example.com", "owner", "a"))
    viewer = closing(new_user(gateway, "viewer@example.com", "viewer", "a"))

    def page(login: Login, name: str) -> httpx2.Response:
        return login.post(f"/dashboard/accounts/{ids[name]}/settings", do="export")

    def paths(name: str) -> list[str]:
        part = f"export/content?as_of=1s&requests={request_id('ab'.index(name))}"
        of_account = f"/admin/v1/accounts/{ids[name]}"
        return [f"{of_account}/{each}" for each in ("export", "export.zip", part)]

    def content(answer: httpx2.Response) -> set[str]:
        assert answer.status_code == 200, answer.text
        return {name for name in files_in(answer.content) if name.startswith("content/")}

    for path in paths("a"):
        viewer.get(path, 403)
    for path in paths("b"):
        owner.get(path, 404)
    assert (page(viewer, "a").status_code, page(owner, "b").status_code) == (403, 404)
    with anonymous(gateway) as client:
        assert [client.get(path).status_code for path in paths("a")] == [401] * 3
    both = {f"content/{request_id(0)}.{kind}" for kind in ("request", "response")}
    assert content(page(owner, "a")) == content(owner.get(paths("a")[1])) == both
    owner.get(paths("a")[2])
    # Bodies are not for operators in a browser, also if they remove an account's owner first.
    operator.client.delete(f"/admin/v1/users/{owner.user['id']}")
    for name in ("a", "b"):
        plan, archive, part = paths(name)
        assert content(page(operator, name)) == content(operator.get(archive)) == set()
        operator.get(part, 403)
        assert not operator.get(plan).json()["with_content"]
    noted = [
        each["changed_by"]
        for each in gateway.api("GET", "/changes")["changes"]
        if each["kind"] == "request_log"
    ]
    assert noted == ["owner@example.com of a"] * 3


def test_a_terminated_account_is_exported_until_it_is_erased(
    make_gateway: MakeGateway, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway()
    gateway.cli("account", "add", "a")
    own = gateway.cli("account", "show", "a")["id"]
    store_content(gateway, {request_id(1): (own, BODY, ANSWER, True)})

    def change(sql: str) -> None:
        with contextlib.closing(sqlite3.connect(gateway.database)) as database, database:
            database.execute("INSERT INTO acting VALUES (1, 'test', 1)")
            database.execute(f"UPDATE accounts SET {sql}")
            database.execute("DELETE FROM acting")

    change("status = 'terminated', terminated_at = 1, erase_at = 1 << 40")
    gateway.start()
    assert f"content/{request_id(1)}.response" in export(gateway)
    operator = closing(new_user(gateway, "op@example.com"))
    of_page = operator.post(f"/dashboard/accounts/{own}/settings", do="export")
    assert not any(name.startswith("content/") for name in files_in(of_page.content))
    gateway.terminate()
    change("erased_at = 2")
    gateway.start()
    refused = gateway.run("account", "export", "a", "--to", str(gateway.folder / "b.zip"))
    assert (refused.returncode, "was erased" in refused.stderr) == (1, True)
    assert leftovers(gateway) == []


# ── Interruptions ────────────────────────────────────────────────────────────────────────────────


AT_THE_SAME_TIME = """
    UPDATE requests SET started_at = (SELECT min(started_at) FROM requests)
     WHERE request_id IN (SELECT request_id FROM requests ORDER BY request_id LIMIT 2500)"""


@pytest.fixture
def large(make_gateway: MakeGateway) -> Gateway:
    """A gateway whose account has 24,000 requests in 12 months, 2,500 of them at one instant."""
    gateway = make_gateway()
    gateway.cli("db", "check")
    fill(gateway.database, 24_000, 1)
    with contextlib.closing(sqlite3.connect(gateway.database)) as database, database:
        (trigger,) = database.execute(
            "SELECT sql FROM sqlite_schema WHERE name = 'settled_is_settled'"
        ).fetchone()
        database.execute("DROP TRIGGER settled_is_settled")
        database.execute(AT_THE_SAME_TIME)
        database.execute(trigger)
    return gateway.start()


def test_an_export_that_was_killed_goes_on_where_it_stopped(large: Gateway) -> None:
    target = large.folder / "a.zip"
    folder = large.folder / "a.zip.partial"
    command = large.command("account", "export", "acct_1", "--to", str(target))

    def names() -> set[str]:
        return {each.name for each in folder.iterdir()} if folder.exists() else set()

    def kill_when(condition: Callable[[], object]) -> None:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda: condition() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was too quick"

    kill_when(folder.exists)
    kill_when((folder / "plan.json").exists)
    plan = (folder / "plan.json").read_bytes()
    parts = len(json.loads(plan)["parts"])
    for number in (0, 5, 9):
        kill_when((folder / f"{number:05}.zip").exists)
    assert (folder.stat().st_mode & 0o777, (folder / "plan.json").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    kept = {name: (folder / name).stat().st_ino for name in names() if name[0] == "0"}
    assert len(kept) >= 10
    kill_when(lambda: {f"{parts - 1:05}.zip", "new"} <= names())  # it joins them
    assert not target.exists()
    again = {name: (folder / name).stat().st_ino for name in kept}
    assert again == kept  # nothing was fetched twice
    other = large.run("account", "export", "nobody", "--to", str(target))
    assert "is the unfinished export of account 'account 1'" in other.stderr
    done = large.cli("account", "export", "account 1", "--to", str(target))
    assert (leftovers(large), done["account"]) == ([], "account 1")
    assert json.loads(files_in(target)["manifest.json"])["as_of"] == json.loads(plan)["as_of"]
    # Without an interruption, the export of this instant is the same.
    whole = large.folder / "whole.zip"
    unbroken = large.folder / "whole.zip.partial"
    unbroken.mkdir(mode=0o700)
    (unbroken / "plan.json").write_bytes(plan)
    large.cli("account", "export", "acct_1", "--to", str(whole))
    assert whole.read_bytes() == target.read_bytes()
    # If it was killed while the folder was removed, only that is left to do.
    folder.mkdir()
    (folder / "plan.json").write_bytes(plan)
    assert large.cli("account", "export", "acct_1", "--to", str(target)) == done
    assert leftovers(large) == []
    # A file that is not the export's stays.
    folder.mkdir()
    (folder / "plan.json").write_bytes(plan)
    target.write_bytes(b"mine")
    refused = large.run("account", "export", "acct_1", "--to", str(target))
    assert (refused.returncode, "exists already" in refused.stderr) == (1, True)
    shutil.rmtree(folder)
    refused = large.run("account", "export", "acct_1", "--to", str(target))
    assert (refused.returncode, "exists already" in refused.stderr) == (1, True)
    assert target.read_bytes() == b"mine"


def test_an_export_outlives_its_gateway_and_ctrl_c(large: Gateway) -> None:
    target, folder = large.folder / "a.zip", large.folder / "a.zip.partial"
    command = large.command("account", "export", "acct_1", "--to", str(target))

    def interrupt_at(part: int, interrupt: Callable[[subprocess.Popen[str]], None]) -> None:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        file = folder / f"{part:05}.zip"
        wait_until(lambda: file.exists() or process.poll() is not None)
        interrupt(process)
        _, said = process.communicate()
        assert process.returncode == 1, said
        assert "Error: the export was interrupted" in said
        assert "Give the same command again" in said

    interrupt_at(3, lambda _: large.kill())
    large.start()
    interrupt_at(6, lambda process: process.send_signal(signal.SIGINT))
    large.terminate()  # and no gateway is needed
    done = large.run("account", "export", "acct_1", "--to", str(target))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Exporting account 1: ")]
    files = files_in(target)
    number = len(files) - 1  # without the manifest
    assert lines[-1].startswith(f"Exporting account 1: {number} of {number} files, "), lines
    rows = [
        len(json.loads(content)["requests"])
        for name, content in files.items()
        if name.startswith("usage/") and name.endswith(".json")
    ]
    assert sum(rows) == 24_000
    assert leftovers(large) == []


def test_a_full_disk_is_one_clear_line(large: Gateway) -> None:
    target = large.folder / "a.zip"
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    for most in (20_000, 400_000):  # for a part, and for the archive
        limited = limit + f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
        command = large.command("account", "export", "acct_1", "--to", str(target))[1:]
        done = subprocess.run(
            [sys.executable, "-c", limited + RUN, *command], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert "Error: the export was interrupted: File too large. Give the same" in done.stderr
        assert not target.exists()
    large.cli("account", "export", "acct_1", "--to", str(target))
    files_in(target)
    assert leftovers(large) == []


def test_a_download_breaks_off_with_its_session(
    large: Gateway, closing: Callable[[Login], Login]
) -> None:
    """It would look complete otherwise."""
    page, api = "/dashboard/accounts/acct_1/settings", "/admin/v1/accounts/acct_1/export.zip"
    for method, path, form in (("POST", page, {"do": "export"}), ("GET", api, None)):
        owner = closing(new_user(large, "owner@example.com", "owner", "account 1"))
        got = b""
        with owner.client.stream(method, path, data=form) as answer:
            parts = answer.iter_raw()
            got = next(parts)
            large.api("DELETE", f"/users/{owner.user['id']}")
            with pytest.raises(httpx2.HTTPError):
                got += b"".join(parts)
        assert not zipfile.is_zipfile(io.BytesIO(got))


# ── Large accounts ───────────────────────────────────────────────────────────────────────────────

MEGABYTE = 1 << 20
MEASURED = """
import atexit, resource, sys
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))
"""


@pytest.mark.slow
def test_a_large_account_takes_no_memory_and_holds_nobody_up(
    make_gateway: MakeGateway, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway()
    gateway.cli("account", "add", "small")
    fill(gateway.database, 50_000, 1)

    def by_command(account: str) -> int:
        """Export on a stopped gateway. Return the command's maximum memory in bytes."""
        command = gateway.command("account", "export", account, "--to", f"{account}.zip")[1:]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED + RUN, *command],
            capture_output=True,
            text=True,
            cwd=gateway.folder,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stderr.splitlines()[-1]) * 1024

    assert by_command("acct_1") - by_command("small") < 32 * MEGABYTE
    size = (gateway.folder / "acct_1.zip").stat().st_size
    gateway.start()
    owner = closing(new_user(gateway, "owner@example.com", "owner", "account 1"))

    def download(name: str) -> int:
        path = f"/admin/v1/accounts/{name}/export.zip"
        with owner.client.stream("GET", path) as answer:
            return sum(len(part) for part in answer.iter_raw())

    download(str(owner.user["account_id"]))  # the first time, caches are filled
    before = gateway.rss()

    def longest() -> float:
        with Stalls(gateway.port) as stalls:
            assert download("acct_1") == pytest.approx(size, rel=0.1)
        return stalls.longest

    assert calmest(longest, 30) < 30
    assert gateway.rss() - before < 32 * MEGABYTE
