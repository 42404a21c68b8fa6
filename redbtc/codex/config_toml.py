"""What to put into Codex CLI's config.toml, for the command `codex config` and the dashboard.

docs/clients.md says what was measured of each choice, and with which versions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import orjson

from redbtc.config import Settings
from redbtc.errors import UserError

KEY_VARIABLE = "REDBTC_API_KEY"
# Models of Codex's own catalogue, for a gateway that has none: with another one, Codex does not
# know which tools to offer. Versions 0.169.0 and 0.171.0 have all of these.
BUILT_IN_MODELS = (
    *("gpt-6.1-sol", "gpt-6.1-terra", "gpt-6-astra", "gpt-6-sol", "gpt-6-luna"),
    *("gpt-5.6-sol", "gpt-5.6-terra", "gpt-5.6-luna", "gpt-5.5"),
)
UNUSABLE = (
    "# This model can't be used: no upstream serves a model that the key may use and that has a "
    "price."
)


class CodexOffer(NamedTuple):
    """The offer of a gateway to Codex."""

    websocket: Callable[[str], bool]  # whether an upstream serves a model over a WebSocket
    catalog: bool
    models: tuple[str, ...]  # that Codex knows, the best to begin with first
    key_header: str  # that of the gateway's key beside a login of the user's own; "": Authorization
    serves: Callable[[str], bool]  # whether an upstream serves a model


def offer_of(settings: Settings, own_login: bool | None, models: tuple[str, ...]) -> CodexOffer:
    """Return what a gateway with these settings offers to Codex. `own_login`: to users with a login
    or key of their own; None: only if there are no upstreams for others. Raises UserError."""
    clients = [each for each in settings.upstreams if each.credentials == "client"]
    operators = [each for each in settings.upstreams if each.credentials != "client"]
    if own_login is None:
        own_login = not operators
    if own_login and not clients:
        raise UserError('no upstream takes users\' own logins (credentials = "client")')
    upstreams = clients if own_login else operators
    return CodexOffer(
        websocket=lambda model: any(
            each.speaks_websocket and each.serves(model) for each in upstreams
        ),
        catalog=bool(settings.codex.catalog),
        models=models,
        key_header=settings.server.key_headers[0] if own_login else "",
        serves=lambda model: any(each.serves(model) for each in upstreams),
    )


def config_toml(base_url: str, model: str, offer: CodexOffer, is_usable: bool) -> str:
    """Return the TOML text, with the reason of each choice in a comment. `is_usable`: the key may
    use the model, an upstream serves it, and it has a price if it needs one."""
    lines = [UNUSABLE] if not is_usable else []
    lines += [
        f"model = {toml_string(model)}",
        'model_provider = "redbtc"',
        "",
        "[model_providers.redbtc]",
        "# With another name, Codex has no web search with gpt-5.6 and gpt-6 models, and compacts",
        "# long sessions by a prompt. Use another name if the upstream is not OpenAI's: it may not",
        "# know what Codex sends with this one (compaction_trigger, configuration_update).",
        'name = "OpenAI"',
        f"base_url = {toml_string(base_url)}",
        *key_lines(offer.key_header),
        'wire_api = "responses"',
    ]
    if offer.websocket(model):
        lines += [
            "# Over a WebSocket, Codex sends only what is new, not the whole session each time.",
            "supports_websockets = true",
        ]
    else:
        lines += ["# No upstream offers WebSocket for this model.", "supports_websockets = false"]
    if offer.catalog:
        lines += [
            "# The models that the key may use, with what Codex must know of them.",
            f"model_catalog_url = {toml_string(f'{base_url}/models')}",
        ]
    return "\n".join(lines) + "\n"


def key_lines(key_header: str) -> list[str]:
    """Return the lines that say where Codex finds the gateway's key and sends it."""
    if key_header:
        return [
            "# Your own login (codex login) goes to the upstream; the gateway's key is sent in a",
            "# header of its own.",
            "requires_openai_auth = true",
            f'env_http_headers = {{ {toml_string(key_header)} = "{KEY_VARIABLE}" }}',
        ]
    return [
        "# The desktop app has no variables of your shell: there, put requires_openai_auth = true",
        "# in place of env_key, and log in with the key as an API key.",
        f'env_key = "{KEY_VARIABLE}"',
    ]


def toml_string(text: str) -> str:
    """Return a text as a basic string of TOML."""
    return orjson.dumps(text).decode().replace("\x7f", "\\u007f")
