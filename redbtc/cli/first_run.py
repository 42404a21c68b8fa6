"""What the first start makes and shows."""

from __future__ import annotations

import os
import sys

import msgspec
from msgspec import convert

from redbtc.admin.actors import Actor
from redbtc.admin.api import API, prices_of
from redbtc.admin.inputs import NewPrices
from redbtc.billing.books import Billing
from redbtc.cli.money import read_prices
from redbtc.config import shipped
from redbtc.store.accounts import Accounts

FIRST_ACCOUNT = "first"
FIRST_RUN = "first run"  # who makes its changes
FIRST_OPERATOR = "operator@localhost"


async def import_example(books: Billing) -> None:
    """The prices of prices.toml, so that a newcomer's first requests are served; none where they
    are in another currency."""
    example = convert(read_prices(shipped("prices.toml")), NewPrices)
    if example.currency == books.currency:
        prices = prices_of(example, books.store.time())
        await books.add_prices(prices, without_notice=None, by=FIRST_RUN)


async def dashboard(api: API) -> str:
    """Where it is. Until an operator has a password, and unless somebody has been made one, the
    first gets a link at each start to set one."""
    actor = Actor(FIRST_RUN, "operator")
    operators = await api.users.all(None, "operator")
    first = [user.id for user in operators if user.email == FIRST_OPERATOR]
    if any(user.password_set_at for user in operators) or (operators and not first):
        return f"Dashboard  {api.dashboard_url}\n"
    if first:
        added = await api.perform(API.reset_user, actor, {"user": first[0]})
    else:
        new = {"email": FIRST_OPERATOR, "role": "operator"}
        added = await api.perform(API.add_user, actor, body=msgspec.json.encode(new))
    return f"Dashboard  {added.link}   (to set the operator's password, once)\n"


async def welcome(api: API, base_url: str, demo: bool) -> str:
    """What a newcomer needs: with no account yet, a first one and its key, shown this once."""
    accounts = Accounts(api.books.store)
    command = f"{os.path.relpath(sys.executable)} {os.path.relpath(sys.argv[0])}"
    key = "$REDBTC_API_KEY"
    about_key = f"Your API key was shown at the first start. Another:  {command} key add first"
    if not await accounts.any():
        account = await accounts.add(FIRST_ACCOUNT, None, {}, FIRST_RUN)
        key = (await accounts.add_key(account.id, FIRST_RUN, None, {}, FIRST_RUN)).key
        about_key = f"API key    {key}   (shown this once: store it now)"
    model = await api.example_model(None)
    chat = f'{{"model":"{model}","messages":[{{"role":"user","content":"Say hello."}}]'
    curl = f'curl {base_url}/chat/completions -H "Authorization: Bearer {key}"'
    curl += ' -H "Content-Type: application/json"'
    upstream = (
        "a demonstration upstream: no model is behind it. Set OPENAI_API_KEY for OpenAI."
        if demo
        else "the upstreams of the settings."
    )
    return f"""
RedBTC AI forwards to {upstream}

Base URL   {base_url}
{about_key}

Try it, plain and streamed:

{curl} -d '{chat}}}'

{curl} -N -d '{chat},"stream":true}}'

What was used:  {command} usage
"""
