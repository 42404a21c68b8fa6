"""The head of a document's file, the rules for new versions, and the example files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from redbtc.billing.document_files import (
    MAX_DOCUMENT_BYTES,
    Document,
    date_text,
    parse_document,
    read_document,
    read_documents,
)
from redbtc.billing.documents import Published, is_new
from redbtc.config import Settings, SettingsError, SiteSettings, parse_settings
from redbtc.times import DAY, MINUTE
from tests.helpers.gateway import ROOT

pytestmark = pytest.mark.promise_6

HEAD = "---\nversion: 2\neffective: 2027-01-15\n---\n"
AT = 1_800_000_000_000 // DAY * DAY  # midnight: 2027-01-15


def test_a_document_is_read() -> None:
    assert parse_document("terms", f"{HEAD}\n# Terms\n\nText.\n\n") == Document(
        "terms", "2", AT, "# Terms\n\nText."
    )
    with_time = HEAD.replace("2027-01-15", "2027-01-15T01:00+01:00")
    assert parse_document("terms", f"{with_time}x").effective_at == AT
    turned = "---\neffective: 2027-01-15 \nversion:2026-12_a.b\n---  \nx\n---\ny"
    assert parse_document("privacy", turned) == Document("privacy", "2026-12_a.b", AT, "x\n---\ny")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: found ''; a head begins with '---'"),
        ("# Terms", "line 1: found '# Terms'; a head begins with '---'"),
        ("---\nversion: 2\n", "line 3: found ''; allowed: version, effective"),
        ("---\nversion: 2", "line 2: the head has no end; end it with '---'"),
        ("---\nversion: 2\n---\nx", "line 3: the head has no field 'effective'"),
        ("---\neffective: 2027-01-15\n---\nx", "line 3: the head has no field 'version'"),
        (HEAD, "line 4: no text after the head"),
        (f"{HEAD} \n\t\n", "line 4: no text after the head"),
        (f"---\nversion: 2\n{HEAD[4:]}x", "line 3: duplicate field 'version'"),
        (f"---\nverison: 2\n{HEAD[4:]}x", "line 2: unknown field 'verison'; allowed: version, eff"),
        (HEAD.replace(": 2\n", ": \n") + "x", "line 2: version: found ''; allowed: 1 to 50 "),
        (HEAD.replace(": 2\n", f": {'1' * 51}\n") + "x", "line 2: version: found '111"),
        (HEAD.replace(": 2\n", ': "2"\n') + "x", "line 2: version: found '\"2\"'; allowed: 1 to"),
        (HEAD.replace(": 2\n", ": a&b\n") + "x", "line 2: version: found 'a&b'; allowed: 1 to"),
        (HEAD.replace("2027-01-15", "15.1.2027") + "x", "line 3: effective: found '15.1.2027'; "),
        (HEAD.replace("2027-01-15", "14d") + "x", "line 3: effective: found '14d'; allowed: a d"),
        (HEAD.replace("2027-01-15", "2027-02-30") + "x", "line 3: effective: '2027-02-30' is not"),
        (HEAD.replace("2027-01-15", "1969-12-31") + "x", "line 3: effective: '1969-12-31' is out"),
    ],
)
def test_a_wrong_head_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "terms.md"
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        read_document("terms", file)
    assert str(refused.value).startswith(f"site.terms: {file}, {said}"), refused.value


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "terms.md"
    file.write_bytes(f"{HEAD}Text.\nMore t\xe9xt.".encode("latin-1"))
    with pytest.raises(SettingsError, match=re.escape(f"{file}, line 6: not UTF-8")):
        read_document("terms", file)
    file.write_text(HEAD + "x" * (MAX_DOCUMENT_BYTES - len(HEAD)))
    assert read_document("terms", file).version == "2"
    file.write_text(HEAD + "x" * (MAX_DOCUMENT_BYTES + 1 - len(HEAD)))
    with pytest.raises(SettingsError, match="larger than the 262144 bytes that are allowed"):
        read_document("terms", file)
    with pytest.raises(SettingsError, match=f"^site.terms: {tmp_path}: not a file$"):
        read_document("terms", tmp_path)
    with pytest.raises(SettingsError, match=r"^site\.privacy: /nowhere/x: No such file"):
        read_documents(SiteSettings(privacy="/nowhere/x"))


def test_ends_of_lines_and_a_byte_order_mark_make_no_other_text(tmp_path: Path) -> None:
    file = tmp_path / "terms.md"
    file.write_bytes(b"\xef\xbb\xbf" + f"{HEAD}a\nb\n".replace("\n", "\r\n").encode())
    assert read_document("terms", file) == parse_document("terms", f"{HEAD}a\nb")


def published(version: str, effective_at: int, text: str = "x") -> Published:
    digest = Document("terms", version, effective_at, text).digest
    return Published("terms", version, effective_at, 0, digest)


def refusal(document: Document, *known: Published, days: int = 14, now: int = AT) -> str:
    with pytest.raises(SettingsError) as refused:
        is_new(document, known, now, days)
    return str(refused.value)


def test_versions_follow_each_other_with_notice() -> None:
    first = published("1", AT - 100 * DAY)
    assert is_new(Document("terms", "1", AT + 999 * DAY, "x"), [], AT, 14), "whenever it applies"
    assert is_new(Document("terms", "1", 0, "x"), [], AT, 14)
    assert not is_new(Document("terms", "1", first.effective_at, "x"), [first], AT, 14)
    assert is_new(Document("terms", "2", AT + 14 * DAY - MINUTE, "y"), [first], AT, 14)
    early = refusal(Document("terms", "2", AT + 13 * DAY, "y"), first)
    assert "site.terms: effective: 2027-01-28 is too early" in early
    assert "14 days of notice (billing.terms_notice_days)" in early
    assert early.endswith("The earliest date is 2027-01-29")
    later = refusal(Document("terms", "2", AT + 14 * DAY, "y"), first, now=AT + 2 * MINUTE)
    assert later.endswith("The earliest date is 2027-01-30"), "the first whole day"
    second = published("2", AT + 40 * DAY, "y")
    order = refusal(Document("terms", "3", AT + 40 * DAY, "z"), first, second)
    assert order.endswith("(2: 2027-02-24). The earliest date is 2027-02-25")
    assert is_new(Document("terms", "3", AT + 41 * DAY, "z"), [first, second], AT, 14)
    assert is_new(Document("terms", "2", AT, "y"), [first], AT, 0), "no notice is needed"


def test_a_published_version_stays_as_it_is() -> None:
    first, second = published("1", AT), published("2", AT + DAY)
    assert refusal(Document("terms", "1", AT, "y"), first) == (
        "site.terms: version 1 was published with another text; give the new text a new version"
    )
    moved = refusal(Document("terms", "1", AT + MINUTE, "x"), first)
    assert "version 1 was published with another date, 2027-01-15;" in moved
    assert "superseded by version 2" in refusal(Document("terms", "1", AT, "x"), first, second)


def test_dates_are_shown_as_people_read_them() -> None:
    assert date_text(AT) == "2027-01-15"
    assert date_text(AT + 90 * MINUTE) == "2027-01-15 01:30 UTC"
    assert date_text(AT + 1500) == "2027-01-15 00:00:01 UTC"


GOOD_CONTACTS = ["security@example.com", "mailto:a.b+c@d-e.f", "https://example.com/report?x=1"]
BAD_CONTACTS = [
    "example.com",
    "http://example.com",
    "https://",
    "https://exa mple.com",
    "a@b.c\nExpires: 2000-01-01T00:00:00Z",
    "https://a.b/\r\nCanonical: x",
    "a@b.c\n",
    "mailto:a@b.c?subject=x",
    "javascript:alert(1)",
    "ä@b.c",
]


def test_the_contact_is_an_address_or_a_url() -> None:
    for contact in ["", *GOOD_CONTACTS]:
        assert parse_settings({"site": {"contact": contact}}).site.contact == contact
    for contact in BAD_CONTACTS:
        with pytest.raises(SettingsError, match=r"^site\.contact: found "):
            parse_settings({"site": {"contact": contact}})


@pytest.mark.parametrize("name", ["terms", "privacy"])
def test_the_example_says_what_the_software_does(name: str) -> None:
    """The numbers in the examples are the defaults, and each setting that they name exists."""
    document = read_document(name, ROOT / "deploy" / f"{name}.md")
    text, settings = re.sub(r"\s+", " ", document.text), Settings()
    assert "This is an example, not legal advice." in document.text.splitlines()[0]
    assert f"at least {settings.billing.terms_notice_days} days before" in text
    assert f"after {settings.retention.terminated_account_days} days" in text
    if name == "terms":
        assert f"{settings.billing.price_notice_days} days before" in text
    else:
        assert f"at most {settings.retention.request_log_days_max}." in text
    named = re.findall(r"\b(server|billing|retention|request_log|site)\.(\w+)", text)
    assert all(hasattr(getattr(settings, table), setting) for table, setting in named)
    assert bool(named) == (name == "privacy")
