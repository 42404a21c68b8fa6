"""The dashboard in a real browser: by keyboard alone, accessible, and safe from what users name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, cast
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.dashboard.pages import OPERATORS_PAGES, PAGES, fill_in
from tests.helpers.documents import days_ahead, reload, write_document
from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway
from tests.helpers.logins import OTHER_PASSWORD, PASSWORD, Login, anonymous, log_in, new_user
from tests.helpers.tools import NODE_MODULES, needs
from tests.helpers.uptimes import fill_unpriced, fill_uptime

pytestmark = [pytest.mark.promise_5, pytest.mark.promise_7]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = needs("chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        expect.set_options(timeout=PATIENCE_SECONDS * 1000)
        yield running
        running.close()


def problems(page: Page) -> list[str]:
    """Return the violations of WCAG 2.2 AA and of best practice that axe-core finds."""
    page.evaluate((NODE_MODULES / "axe-core" / "axe.min.js").read_text())
    found = page.evaluate("() => axe.run()")
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found["violations"]]


# Said of a page to which the browser goes back, and where it restores the focus.
RESTORED = "Autofocus processing was blocked because a document already has a focused element."


def watch(page: Page, said: list[str]) -> None:
    """Collect the messages that a page logs or shows in a dialog."""
    page.on("console", lambda each: said.append(each.text) if each.text != RESTORED else None)
    page.on("dialog", lambda dialog: said.append(dialog.message))


FOCUSED = """() => {
    const at = document.activeElement;
    const label = at.labels && at.labels[0] ? at.labels[0].textContent : at.textContent;
    const parts = at.type === "date";  // which the browser marks by itself
    const ring = parts || getComputedStyle(at).outlineStyle !== "none";
    return [(at.getAttribute("aria-label") || label || "").trim(), ring];
}"""


def tab_to(page: Page, name: str) -> None:
    """Press Tab until what is called so has the focus; whatever has it shows that."""
    for _ in range(80):
        page.keyboard.press("Tab")
        label, ring = page.evaluate(FOCUSED)
        if page.evaluate("document.activeElement !== document.body"):
            assert ring, f"{label} shows no focus"
        if label == name:
            return
    raise AssertionError(f"no Tab leads to {name}")


def press(page: Page, name: str) -> None:
    """Go to what is called so, and press Enter."""
    tab_to(page, name)
    page.keyboard.press("Enter")


def enter(page: Page, name: str = "") -> None:
    """The same, or where the focus is: it leads to another page."""
    if name:
        tab_to(page, name)
    with page.expect_navigation():
        page.keyboard.press("Enter")


def write(page: Page, **fields: str) -> None:
    """Fill in fields, called as they are with spaces for lines."""
    for name, text in fields.items():
        tab_to(page, name.replace("_", " "))
        page.keyboard.press("Control+A")
        page.keyboard.type(text)


def see(page: Page, heading: str) -> None:
    """The page has this heading."""
    expect(page.get_by_role("heading", name=heading, exact=True).first).to_be_visible()


def test_from_the_first_start_to_a_request_on_the_usage_page_by_keyboard_alone(
    make_gateway: MakeGateway, browser: Browser
) -> None:
    gateway = make_gateway().start()
    link = re.search(r"http://\S+(/dashboard/link/\S+)", gateway.log())
    assert link is not None, gateway.log()
    context = browser.new_context(timezone_id="Asia/Tokyo")
    page = context.new_page()
    errors: list[str] = []
    watch(page, errors)
    page.goto(gateway.url + link[1])
    expect(page.locator("input:focus")).to_be_visible()  # the first field has the focus
    page.keyboard.type(PASSWORD)
    write(page, Confirm_password=PASSWORD)
    enter(page)
    see(page, "Overview")
    enter(page, "Accounts")
    see(page, "Accounts")
    write(page, Name="ada")
    enter(page)
    enter(page, "ada")
    see(page, "Usage by day and model")
    enter(page, "Keys")
    see(page, "Create key")
    write(page, Label="laptop")
    enter(page, "Create key")
    see(page, "Your new key: laptop")
    key = page.locator("#secret").inner_text()
    with gateway.client(key) as client:
        answer = client.post("/responses", json={"model": "gpt-5.5", "input": "Hi"})
        assert answer.status_code == 200
    enter(page, "Usage")
    row = page.locator("tbody tr")
    expect(row).to_have_count(1)
    expect(row).to_contain_text("completed")
    expect(row).to_contain_text(answer.headers["x-redbtc-request-id"])
    started = gateway.row()["started_at"]
    hour = (int(started[11:13]) + 9) % 24
    expect(row.locator("time")).to_contain_text(f"{hour:02}:{started[14:16]}")
    assert errors == []
    context.close()


def test_an_account_s_owner_by_keyboard_alone(gateway: Gateway, browser: Browser) -> None:
    gateway.api("POST", "/accounts", {"name": "a"})
    new_user(gateway, "ada@example.com", "owner", "a").client.close()
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{gateway.url}/dashboard/")
    expect(page.locator("input:focus")).to_be_visible()  # the first field has the focus
    page.keyboard.type("ada@example.com")
    write(page, Password=PASSWORD)
    enter(page)
    see(page, "a")
    tab_to(page, "Skip to content")
    enter(page, "Keys")
    see(page, "Create key")
    write(page, Label="by hand", Expires="tomorrow")
    enter(page, "Create key")
    refused = page.locator("#add-expires")
    expect(refused).to_be_focused()  # and says why
    expect(refused).to_have_attribute("aria-invalid", "true")
    expect(refused).to_have_accessible_description(re.compile("Expected a time "))
    expect(page.get_by_label("Label")).to_have_value("by hand")
    page.keyboard.press("Control+A")
    page.keyboard.type("30d")
    enter(page, "Create key")
    expect(page.locator("#secret")).to_contain_text("sk-redbtc-")
    press(page, "Copy")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    press(page, "Rotate by hand")
    write(page, Keep_the_old_key_working_for="1h")
    enter(page, "Rotate key")
    see(page, "Your new key: by hand")
    press(page, "Report as compromised: by hand")
    enter(page, "Report as compromised")
    see(page, "Compromised key: by hand")
    expect(page.locator("#secret")).to_contain_text("sk-redbtc-")
    expect(page.locator("tbody").last).to_contain_text("compromised")
    enter(page, "Usage")
    see(page, "a")
    write(page, Model="gpt-5*")
    enter(page, "Apply filters")
    expect(page.get_by_text("No requests in this period.")).to_be_visible()
    enter(page, "Billing")
    see(page, "Statements")
    enter(page, page.locator("tbody a").first.inner_text())
    enter(page, "Members")
    see(page, "Invite a member")
    write(page, Email_address="grace@example.com")
    enter(page, "Invite member")
    expect(page.locator("#link")).to_contain_text("/dashboard/link/")
    press(page, "Remove: grace@example.com")
    enter(page, "Remove login")
    expect(page.get_by_role("status").first).to_have_text("Done.")
    enter(page, "ada@example.com")
    see(page, "Sessions")
    write(page, Current_password=PASSWORD, New_password=OTHER_PASSWORD)
    write(page, Confirm_new_password=OTHER_PASSWORD)
    enter(page)
    see(page, "Usage by day and model")
    enter(page, "Log out")
    see(page, "Log in")
    keys = gateway.api("GET", "/accounts/a/keys")["keys"]
    assert [key["compromised"] for key in keys] == [False, True, False]  # the rotated one
    assert {key["label"] for key in keys} == {"by hand"}
    context.close()


def test_an_operator_by_keyboard_alone(
    gateway: Gateway, browser: Browser, closing: Callable[[Login], Login]
) -> None:
    gateway.new_key("a")
    operator = closing(new_user(gateway, "op@example.com"))
    context = browser.new_context()
    context.add_cookies([cookie_of(operator, gateway)])
    page = context.new_page()
    page.goto(f"{gateway.url}/dashboard/")
    see(page, "Overview")
    enter(page, "Accounts")
    see(page, "All accounts")
    write(page, Search_by_name_or_email="A")
    enter(page)
    see(page, "Results")
    enter(page, "a")
    enter(page, "Manage")
    see(page, "Contact, limits and budgets")
    write(page, Requests_in_flight="many")
    enter(page, "Save changes")
    refused = page.locator("#set-concurrency")
    expect(refused).to_be_focused()
    expect(refused).to_have_accessible_description("Expected a whole number.")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    enter(page, "Save changes")
    expect(page.get_by_role("status").first).to_have_text("Done.")
    tab_to(page, "Amount (USD)")
    page.keyboard.type("12.50")
    enter(page, "Record payment")
    expect(page.get_by_text("The balance is 12.50 USD.")).to_be_visible()
    write(page, Fraction_of_limits="0.5", Until="1h")
    enter(page, "Apply throttle")
    expect(page.get_by_role("heading", level=1)).to_contain_text("throttled to 50 %")
    write(page, Fraction_of_limits="1")
    enter(page, "Apply throttle")
    expect(page.get_by_role("heading", level=1)).to_have_text("a")
    tab_to(page, "Record payment")  # one that comes after it is called Reason, too
    write(page, Reason="unpaid")
    enter(page, "Suspend account")
    expect(page.get_by_text("Suspended: unpaid")).to_be_visible()
    enter(page, "Resume account")
    see(page, "Suspend")
    enter(page, "Prices")
    see(page, "Add a price")
    per = "(per million tokens)"
    write(page, **{"Model": "gpt-9*", f"Input {per}": "1.25", f"Output {per}": "10"})
    enter(page, "Add price")
    expect(page.locator("tbody")).to_contain_text("gpt-9*")
    enter(page, "Notices")
    see(page, "New notice to all accounts")
    write(page, Text="Back soon.", Until="1h")
    tab_to(page, "Maintenance only: reject new requests with 503 during the window")
    page.keyboard.press("Space")
    enter(page, "Publish notice")
    expect(page.locator("tbody")).to_contain_text("503")
    press(page, "Withdraw: Back soon.")
    enter(page, "Withdraw notice")
    expect(page.locator("tbody")).to_contain_text("withdrawn")
    enter(page, "Users")
    see(page, "Invite an operator")
    write(page, Email_address="grace@example.com")
    enter(page, "Invite operator")
    expect(page.locator("#link")).to_contain_text("/dashboard/link/")
    enter(page, "Log")
    see(page, "Log of changes")
    for text in ("grace@example.com", "Back soon.", "gpt-9*", "unpaid", "by op@example.com"):
        expect(page.locator(".changes")).to_contain_text(text)
    context.close()


NASTY = "<script>document.title='owned'</script>\"'><img src=x onerror=document.title='owned'>"
NASTY_ADDRESS = "<script>document.title='owned'</script>\"'><img/src=x>@<b>.c"[:60]


def cookie_of(login: Login, gateway: Gateway) -> Any:
    """Return the session's cookie in the form that a browser context takes."""
    return {"name": "redbtc", "value": login.client.cookies["redbtc"], "url": gateway.url}


@pytest.mark.parametrize(
    ("elsewhere", "status"),
    [
        ("http://evil.example/", 200),  # its request has no cookie: the login
        ("http://127.0.0.1:1/", 403),  # for a browser the same site, and the cookie is sent
    ],
)
def test_a_form_on_another_page_changes_nothing(
    gateway: Gateway,
    browser: Browser,
    closing: Callable[[Login], Login],
    elsewhere: str,
    status: int,
) -> None:
    account = gateway.api("POST", "/accounts", {"name": "a"})
    owner = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    keys = f"{gateway.url}/dashboard/accounts/{account['id']}/keys"
    context = browser.new_context()
    page = context.new_page()
    page.goto(gateway.url + "/dashboard/login")
    strict = {**cookie_of(owner, gateway), "sameSite": "Strict", "httpOnly": True}
    context.add_cookies([cast(Any, strict)])
    form = f'<form method="post" action="{keys}"><input name="do" value="add"><button>Win</button>'
    page.route(elsewhere, lambda route: route.fulfill(body=form, content_type="text/html"))
    page.goto(elsewhere)
    with page.expect_navigation() as navigation:
        page.get_by_role("button").click()
    answer = navigation.value
    assert answer is not None
    assert answer.status == status
    assert gateway.api("GET", "/accounts/a/keys")["keys"] == []
    page.goto(keys)  # the same from a page of our own
    page.get_by_role("button", name="Create key").click()
    expect(page.locator("#secret")).to_contain_text("sk-redbtc-")
    context.close()


def test_a_login_in_a_browser_has_a_new_cookie_that_no_script_sees(
    gateway: Gateway, browser: Browser, closing: Callable[[Login], Login]
) -> None:
    closing(new_user(gateway, "ada@example.com"))
    context = browser.new_context()
    context.add_cookies([{"name": "redbtc", "value": "planted", "url": gateway.url}])
    page = context.new_page()
    page.goto(f"{gateway.url}/dashboard/log")
    page.get_by_label("Email address").fill("ada@example.com")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button").click()
    see(page, "Log of changes")
    cookies = {each["name"]: each for each in context.cookies()}
    assert cookies["redbtc"]["value"] != "planted"
    assert all(each["httpOnly"] and each["sameSite"] == "Strict" for each in cookies.values())
    assert page.evaluate("document.cookie") == ""
    page.get_by_role("button", name="Log out").click()
    see(page, "Log in")
    assert "redbtc" not in {each["name"] for each in context.cookies()}
    context.close()


class Looker:
    """Opens pages, light and wide and dark and narrow, and collects what is wrong with them."""

    def __init__(self, browser: Browser, gateway: Gateway, login: Login) -> None:
        self.found: list[str] = []
        self._gateway = gateway
        self._pages = []
        for scheme, width in (("light", 1280), ("dark", 360)):
            context = browser.new_context(
                color_scheme=scheme,  # type: ignore[arg-type]
                viewport={"width": width, "height": 800},
                user_agent=NASTY,
            )
            context.add_cookies([cookie_of(login, gateway)])
            page = context.new_page()
            watch(page, self.found)
            self._pages.append((f"{scheme} {width}", width, page))

    def look(self, path: str, then: Callable[[Page], object] | None = None) -> None:
        """Open a page, do something there, and collect the problems of what it shows then."""
        for name, width, page in self._pages:
            page.goto(f"{self._gateway.url}{path}")
            if then:
                then(page)
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            self.found += [f"{name} {path}: {problem}" for problem in problems(page)]
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                self.found.append(f"{name} {path} is {wide} pixels wide")
            if page.title() == "owned":
                self.found.append(f"{name} {path} ran a script")

    def close(self) -> None:
        for *_, page in self._pages:
            page.context.close()


def make_new_link(page: Page) -> None:
    """Create a new link for the first user in the table."""
    page.locator("td summary").first.click()
    page.get_by_role("button", name="Create link").first.click()


def report_key(page: Page, key_id: str) -> None:
    """Report a key as compromised."""
    row = page.locator("tr").filter(has_text=key_id)
    row.locator("summary").last.click()
    row.get_by_role("button", name="Report as compromised").click()


@pytest.mark.slow
def test_what_users_name_is_text_and_pages_are_accessible(
    make_gateway: MakeGateway, browser: Browser, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway('[server]\n[billing]\nunpriced_models = "free"').start()
    names = {"name": NASTY.replace("/", ""), "email": NASTY_ADDRESS}
    account = gateway.api("POST", "/accounts", names)
    path = f"/accounts/{account['id']}"
    key = gateway.api("POST", f"{path}/keys", {"label": NASTY, "models": f"{NASTY},m*,gpt*"})
    gone = gateway.api("POST", f"{path}/keys", {"label": "x"})
    gateway.api("POST", f"/keys/{gone['id']}/revoke", {"compromised": True})
    gateway.api("POST", f"{path}/payments", {"amount": "5", "reference": NASTY, "reason": NASTY})
    gateway.api("POST", "/notices", {"kind": "incident", "text": NASTY})
    price = {"model": "<b>*", "input": "1", "source": NASTY}
    gateway.api("POST", "/prices", {"prices": [price, {**price, "effective": "40d"}]})
    link = gateway.api("POST", "/users", {"email": NASTY_ADDRESS, "role": "operator"})["link"]
    member = {"email": NASTY_ADDRESS, "role": "owner", "account": account["name"]}
    gateway.api("POST", "/users", member)
    with gateway.client(key["key"]) as client:
        for model in (NASTY, "gpt-5.5"):
            client.post("/responses", json={"model": model, "input": "Hi"})
    operator = closing(new_user(gateway, "op@example.com"))
    with anonymous(gateway, **{"user-agent": NASTY}) as client:
        log_in(client, "op@example.com", PASSWORD)
    looker = Looker(browser, gateway, operator)
    for page in (*(f"/{name}" for name in OPERATORS_PAGES), "/you"):
        looker.look(f"/dashboard{page}")
    for page in PAGES:
        looker.look(f"/dashboard{path}{page.replace('2026-11', account['month'])}")
    quoted = quote(NASTY, safe="")
    for query in (f"{path}/usage?model={quoted}", f"/accounts?search={quoted}"):
        looker.look(f"/dashboard{query}")
    keys, manage = f"/dashboard{path}/keys", f"/dashboard{path}/manage"
    looker.look(keys, fill_in("Create key", add__label=NASTY))
    looker.look(keys, fill_in("Create key", add__label=NASTY, add__expires=NASTY))
    looker.look(keys, lambda page: report_key(page, key["id"]))
    looker.look(manage, fill_in("Apply throttle", throttle__factor="0.5"))
    looker.look(manage, fill_in("Record payment", pay__amount=NASTY, pay__reason=NASTY))
    gateway.api("POST", f"{path}/suspend", {"reason": NASTY})
    looker.look(manage)
    gateway.api("POST", f"{path}/closing")
    settings = f"/dashboard{path}/settings"
    for page in (manage, settings, "/dashboard/overview", "/dashboard/accounts"):
        looker.look(page)
    looker.look(manage, fill_in("Terminate account", terminate__name="another"))
    looker.look("/dashboard/log")
    page_of_users = f"/dashboard{path}/members"
    looker.look(page_of_users, make_new_link)
    gateway.api("POST", f"{path}/terminate", {})
    for page in (manage, settings):
        looker.look(page)
    looker.look("/dashboard/nowhere")
    looker.look("/status")
    looker.look("/dashboard/login")
    looker.look("/dashboard/login", fill_in("Log in", email=NASTY_ADDRESS, password=NASTY))
    looker.look(urlsplit(link).path)
    again = fill_in("Set password and log in", password="x" * 15, again="y" * 15)
    looker.look(urlsplit(link).path, again)
    looker.look("/dashboard/link/used-up")
    looker.close()
    # The browser says that a page came with an error status.
    found = [each for each in looker.found if "the server responded with a status of" not in each]
    assert found == []


def test_the_uptime_is_accessible_and_its_days_are_reached_by_keyboard(
    make_gateway: MakeGateway, browser: Browser, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway('[server]\n[billing]\nunpriced_models = "refuse"')
    for number in range(7):
        gateway.cli("account", "add", f"account {number}")
    day = fill_uptime(gateway.database)
    fill_unpriced(gateway.database, 22)
    gateway.start()
    looker = Looker(browser, gateway, closing(new_user(gateway, "op@example.com")))
    for path in ("/status", f"/status?day={day}", "/status?day=2020-01-01", "/dashboard/overview"):
        looker.look(path)
    looker.close()
    found = [each for each in looker.found if "the server responded with a status of" not in each]
    assert found == []
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(f"{gateway.url}/status")
    page.get_by_text("Show as table").press("Enter")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=day))
    expect(row).to_contain_text("99.93 %")
    row.get_by_role("link").press("Enter")
    expect(page.get_by_role("table")).to_contain_text("Ledger failed")
    expect(page.get_by_role("table")).to_contain_text("02:10")
    page.context.close()


DOCUMENT = f"""# Terms

{NASTY}

## 1. Use

- Be kind[.](javascript:document.title='owned') [Privacy](/privacy) ![{NASTY}](https://a.b/c.png)
- `{"long" * 50}`

| Party | Duty |
|---|---|
| {NASTY} | {"word " * 30} |

> {NASTY}
"""


def test_an_owner_reads_and_accepts_the_terms_by_keyboard_alone(
    make_gateway: MakeGateway, browser: Browser, closing: Callable[[Login], Login]
) -> None:
    gateway = make_gateway('[server]\n[site]\nterms = "terms.md"\nprivacy = "privacy.md"\n')
    write_document(gateway, "1", text=DOCUMENT)
    write_document(gateway, "1", text="We keep nothing.", name="privacy")
    gateway.start()
    write_document(gateway, "2", days_ahead(20), f"{DOCUMENT}\nNew.")
    reload(gateway)
    account = gateway.api("POST", "/accounts", {"name": "a"})
    owner = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    looker = Looker(browser, gateway, owner)
    members = f"/dashboard/accounts/{account['id']}/members"
    for path in ("/terms", "/terms?version=2", "/privacy", members, members[:-7] + "settings"):
        looker.look(path)
    context = browser.new_context()
    page = context.new_page()
    watch(page, looker.found)
    page.goto(f"{gateway.url}/dashboard/login")
    enter(page, "Terms of service")
    see(page, "Terms")
    page.go_back()
    write(page, Email_address="ada@example.com", Password=PASSWORD)
    enter(page)
    see(page, "Please read and accept")
    enter(page, "Terms of service, version 2")
    expect(page.get_by_text("New.", exact=True)).to_be_visible()
    page.go_back()
    enter(page, "settings")
    expect(page.get_by_role("heading", level=1)).to_have_text("a")
    enter(page, "Members")
    see(page, "Please read and accept")
    enter(page, "Accept documents")
    see(page, "Accepted documents")
    assert page.url.endswith(members)
    looker.look(members)
    looker.close()
    context.close()
    assert looker.found == []


def show_body(name: str) -> Callable[[Page], None]:
    """Return what reads a stored body."""
    return lambda page: page.get_by_role("button", name=f"Show {name} body", exact=True).click()


def test_an_owner_has_requests_logged_and_reads_them_by_keyboard_alone(
    gateway: Gateway, browser: Browser, closing: Callable[[Login], Login]
) -> None:
    key, account = gateway.new_key("a"), gateway.api("GET", "/accounts/a")["id"]
    owner = closing(new_user(gateway, "ada@example.com", "owner", "a"))
    context = browser.new_context()
    context.add_cookies([cookie_of(owner, gateway)])
    page = context.new_page()
    page.goto(f"{gateway.url}/dashboard/")
    enter(page, "Settings")
    see(page, "Request logging")
    expect(page.get_by_text("Off: no body of a request is kept.")).to_be_visible()
    write(page, Days_to_keep_bodies="31")
    enter(page, "Keep bodies")
    expect(page.get_by_role("alert")).to_contain_text("30 days at most")
    write(page, Days_to_keep_bodies="7")
    enter(page, "Keep bodies")
    expect(page.get_by_text("On: the bodies of all requests are kept for 7 days.")).to_be_visible()
    with gateway.client(key) as client:
        answer = client.post("/responses", json={"model": "gpt-up", "input": NASTY})
    request_id = answer.headers["x-redbtc-request-id"]
    enter(page, "Usage")
    expect(page.locator("tbody tr")).to_contain_text("Bodies stored")
    enter(page, request_id)
    see(page, "Bodies")
    enter(page, "Show request body")
    body = page.locator("#request-body")
    expect(body).to_have_text(
        json.dumps({"model": "gpt-up", "input": NASTY}, separators=(",", ":"))
    )
    press(page, "Copy")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    expect(page.locator("#response-body")).to_have_count(0)
    tab_to(page, "Download response body")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.path().read_bytes() == answer.content
    enter(page, "Settings")
    expect(page.get_by_role("region", name="The last readings, newest first")).to_contain_text(
        request_id
    )
    looker = Looker(browser, gateway, owner)
    settings, request = (
        f"/dashboard/accounts/{account}/{each}" for each in ("settings", f"usage/{request_id}")
    )
    looker.look(settings)
    looker.look(f"/dashboard/accounts/{account}/usage")
    for name in ("request", "response"):
        looker.look(request, show_body(name))
    looker.close()
    for email, role, of in (("vi@example.com", "viewer", "a"), ("op@example.com", "operator", "")):
        other = Looker(browser, gateway, closing(new_user(gateway, email, role, of)))
        other.look(request)
        if role == "operator":
            other.look(settings)
        other.close()
        looker.found += other.found
    assert looker.found == []
    press(page, "Switch off")
    tab_to(page, "Erase stored bodies now")
    page.keyboard.press("Space")
    enter(page, "Switch off logging")
    expect(page.get_by_role("status").first).to_have_text("Bodies of 1 request erased.")
    context.close()


def test_pages_of_a_new_gateway_are_accessible(
    gateway: Gateway, browser: Browser, closing: Callable[[Login], Login]
) -> None:
    account = gateway.api("POST", "/accounts", {"name": "a"})
    looker = Looker(browser, gateway, closing(new_user(gateway, "ada@example.com", "viewer", "a")))
    for page in ("", "/keys", "/usage", "/billing", "/notices"):
        looker.look(f"/dashboard/accounts/{account['id']}{page}")
    looker.close()
    assert looker.found == []
