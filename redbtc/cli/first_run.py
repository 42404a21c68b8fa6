"""The account, the key and the prices that the first start makes, and what it prints."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import convert

from redbtc.admin.actors import Actor
from redbtc.admin.api import API
from redbtc.admin.api_money import prices_of
from redbtc.admin.inputs import NewPrices, NewUser, WhichUser
from redbtc.billing.billing import Billing
from redbtc.billing.price_changes import add_prices
from redbtc.cli.money import read_prices
from redbtc.config import LoadedSettings, shipped
from redbtc.upstream_settings import UpstreamSettings

FIRST_ACCOUNT = "first"
FIRST_RUN = "first run"  # the author of these changes in the log
FIRST_OPERATOR = "operator@localhost"


async def import_example(billing: Billing, loaded: LoadedSettings) -> None:
    """Add the prices of prices.toml, so that a newcomer's first requests are served, unless they
    are in another currency. The file beside the settings, which `init` makes, goes before the one
    that comes with the program."""
    beside = loaded.folder / "prices.toml"
    path = beside if loaded.file and beside.exists() else shipped("prices.toml")
    example = convert(read_prices(path), NewPrices)
    if example.currency == billing.currency:
        prices = prices_of(example, billing.store.time())
        await add_prices(billing, prices, without_notice=None, by=FIRST_RUN)


async def dashboard_lines(api: API) -> str:
    """Return the lines to print about the dashboard: its URL. As long as no operator has set a
    password, and the only operator is FIRST_OPERATOR or none, they contain a new one-time link
    for FIRST_OPERATOR instead, who is added if missing."""
    actor = Actor(FIRST_RUN, "operator")
    operators = await api.users.all(None, "operator")
    first = [user.id for user in operators if user.email == FIRST_OPERATOR]
    if any(user.password_set_at for user in operators) or (operators and not first):
        return f"Dashboard  {api.dashboard_url}\n"
    if first:
        added = await api.perform(API.reset_user, actor, WhichUser(), user=first[0])
    else:
        new = NewUser(email=FIRST_OPERATOR, role="operator")
        added = await api.perform(API.add_user, actor, new)
    return f"Dashboard  {added.link}   (one-time link to set the operator's password)\n"


async def welcome(
    api: API, base_url: str, upstreams: Iterable[UpstreamSettings], demo: bool, command: str
) -> str:
    """Return what a newcomer needs to know. If there is no account, create one with a key.
    `command` is how the program is called."""
    accounts = api.accounts
    key = "$REDBTC_API_KEY"
    about_key = (
        f"Your API key was shown at the first start. To create another:  {command} key add first"
    )
    if not await accounts.exist():
        account = await accounts.add(FIRST_ACCOUNT, None, {}, FIRST_RUN)
        key = (await accounts.add_key(account.id, FIRST_RUN, None, {}, FIRST_RUN)).key
        about_key = f"API key    {key}   (copy it now: it won't be shown again)"
    model = await api.example_model(None)
    chat = f'{{"model":"{model}","messages":[{{"role":"user","content":"Say hello."}}]'
    curl = f'curl {base_url}/chat/completions -H "Authorization: Bearer {key}"'
    curl += ' -H "Content-Type: application/json"'
    target = ", ".join(f"{each.name} ({each.base_url})" for each in upstreams)
    if demo:
        target = "the demonstration upstream (answers are canned, usage is real)\n"
        target += "To use OpenAI, set OPENAI_API_KEY and start again."
    return f"""
Forwarding to: {target}

Base URL   {base_url}
{about_key}

Try it, without and with streaming:

{curl} -d '{chat}}}'

{curl} -N -d '{chat},"stream":true}}'

Show usage:  {command} usage
"""
