"""The command check."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx2
import msgspec

from redbtc.billing.document_files import read_documents
from redbtc.billing.documents import DOCUMENTS, by_document, is_new
from redbtc.billing.model_patterns import matches
from redbtc.billing.price_texts import few
from redbtc.cli.check_warnings import warnings_of
from redbtc.cli.main import CommandContext, commands, json_option, show
from redbtc.codex.catalog import MAX_BODY, SETTING, CatalogError, parse_catalog, size_of
from redbtc.codex.model_info import MEASURED_VERSION
from redbtc.config import LoadedSettings, Settings, SettingsError, is_web_address, missing_keys
from redbtc.gateway.model_catalog import fetch_catalog
from redbtc.meter.error_codes import error_code_in
from redbtc.rates import DEFAULT_TIER
from redbtc.store.consistency import check_file, rows_of
from redbtc.store.schema import newest_version
from redbtc.times import now_ms
from redbtc.upstream.certificates import check_ca_files
from redbtc.upstream.configured import Upstreams
from redbtc.upstream.failures import cause_of
from redbtc.upstream.upstreams import NO_LIST, Upstream


class AskedUpstream(msgspec.Struct):
    """The answer of a member that was asked for its models. `code` is the upstream's error code,
    or says why there was no answer or no list."""

    name: str
    ok: bool = False
    models: int | None = None
    status: int | None = None
    code: str | None = None

    def text(self) -> str:
        """Return a line for people."""
        if self.code == "client_credentials":
            said = "not asked, since its clients send their own credentials"
        elif self.ok:
            said = f"{self.models} model{'' if self.models == 1 else 's'}"
        elif self.code == "unusable":
            said = "not asked, since an environment variable is not set"
        elif self.status is None:
            said = f"no answer ({self.code})"
        elif self.status == 200:
            said = "the answer is not a list of models"
        else:
            said = f"status {self.status}" + (f" ({self.code})" if self.code else "")
        return f"upstream {self.name}: {said}"


@commands.command(short_help="Check the settings and the database, and warn.")
@click.option(
    "--upstreams",
    is_flag=True,
    help="Also ask each upstream, with each key, for its models, and fetch a codex.catalog at a "
    "URL.",
)
@json_option
@click.pass_obj
def check(context: CommandContext, upstreams: bool, as_json: bool) -> None:
    """Check the settings, the database and Codex CLI's model catalogue.

    Warnings say what will hurt later, and don't change the exit status. Exits with 2 if there are
    problems. Exits with 1 if there are none, but an upstream does not answer with a list of
    models."""
    try:
        loaded = context.loaded
        check_ca_files(loaded.settings.upstreams)
    except SettingsError as error:
        show_check(None, Found([str(error)]), None, as_json)
    else:
        currency = loaded.settings.billing.currency
        problems = missing_keys(loaded.settings)
        problems += check_file(loaded.database_path, currency)
        problems += check_documents(loaded)
        catalog_problems, notes = check_catalog(loaded, fetches=upstreams)
        notes += check_schema(loaded) + check_unpriced(loaded)
        asked = asyncio.run(ask_all(loaded.settings)) if upstreams else None
        found = Found(problems + catalog_problems, notes, warnings_of(loaded))
        show_check(loaded, found, asked, as_json)


def check_documents(loaded: LoadedSettings) -> list[str]:
    """Return why the terms or the privacy policy could not be published; the ledger may be in
    use. Nothing is written."""
    try:
        documents = read_documents(loaded.settings.site)
    except SettingsError as error:
        return [str(error)]
    published, problems = by_document(rows_of(loaded.database_path, DOCUMENTS)), []
    for document in documents:
        try:
            days = loaded.settings.billing.terms_notice_days
            is_new(document, published[document.name], now_ms(), days)
        except SettingsError as error:
            problems.append(str(error))
    return problems


class Found(NamedTuple):
    """The findings: problems, notes and warnings, a line each."""

    problems: Sequence[str]
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


def show_check(
    loaded: LoadedSettings | None,
    found: Found,
    asked: Sequence[AskedUpstream] | None,
    as_json: bool,
) -> None:
    """Print what `check` has found, and exit with its status if that is not 0. `loaded` is None if
    the settings can't be read, `asked` if the upstreams were not asked."""
    failed = [each for each in asked or () if not each.ok]
    ok = not found.problems and not failed
    shown: dict[str, Any] = {
        "ok": ok,
        "settings": str(loaded.file) if loaded and loaded.file else None,
        "database": str(loaded.database_path) if loaded else None,
        **{name: list(lines) for name, lines in found._asdict().items()},
    }
    if asked is not None:
        shown["upstreams"] = [msgspec.structs.asdict(each) for each in asked]
    read = [f"settings: {loaded.file or 'built-in defaults'}"] if loaded else []
    warnings = [f"warning: {each}" for each in found.warnings]
    answers = [each.text() for each in asked or ()]
    ends = "ok" if ok else "not ok"
    lines = [*read, *found.notes, *answers, *warnings, *found.problems, ends]
    show(shown, as_json, lambda: "\n".join(lines))
    if not ok:
        raise SystemExit(2 if found.problems else 1)


def check_catalog(loaded: LoadedSettings, *, fetches: bool) -> tuple[list[str], list[str]]:
    """Return the problems of Codex CLI's model catalogue, and notes about it. One at a URL is
    looked at only if `fetches`."""
    place, settings = loaded.settings.codex.catalog, loaded.settings
    if not place or (is_web_address(place) and not fetches):
        return [], []
    try:
        if is_web_address(place):
            models = parse_catalog(asyncio.run(fetched_catalog(settings)))
        else:
            models = parse_catalog(Path(place).read_bytes())
    except OSError as error:
        return [f"{SETTING}: {place}: {error.strerror}"], []
    except CatalogError as error:
        return [f"{SETTING}: {place}: {line}" for line in error.problems], []
    notes = [
        f"{SETTING}: model {model.slug!r}: {field} is {value!r}, which Codex {MEASURED_VERSION} "
        "does not know; it then ignores the whole catalogue"
        for model in models
        for field, value in model.unknown
    ]
    served = models
    if settings.billing.unpriced_models == "refuse":
        patterns = patterns_with_price(loaded.database_path)
        served = tuple(model for model in models if matches(model.slug, patterns))
    unpriced = ", ".join(model.slug for model in models if model not in served)
    if unpriced:
        notes.append(f"{SETTING}: these models have no price and are left out: {unpriced}")
    if (size := size_of(served)) <= MAX_BODY:
        return [], notes
    problem = (
        f"{SETTING}: {place}: has {size} bytes for a key that may use all models; Codex may ignore "
        f"more than {MAX_BODY}"
    )
    return [problem], notes


UNPRICED_NAMES = "SELECT model FROM unpriced_models ORDER BY requests DESC, model"


def check_schema(loaded: LoadedSettings) -> list[str]:
    """Return a note about a database that this version has to migrate."""
    known = newest_version()
    versions = rows_of(loaded.database_path, "PRAGMA user_version")
    return [
        f"the database has schema {version}; this version migrates it to {known} when it starts, "
        "so reload is a short restart"
        for (version,) in versions
        if 0 < version < known
    ]


def check_unpriced(loaded: LoadedSettings) -> list[str]:
    """Return a note about models that clients asked for and that have no price."""
    if loaded.settings.billing.unpriced_models == "free":
        return []
    patterns = patterns_with_price(loaded.database_path)
    names = [model for (model,) in rows_of(loaded.database_path, UNPRICED_NAMES)]
    missing = [model for model in names if not matches(model, patterns)]
    about = "clients asked for models that have no price, and were refused"
    return [f"{about}: {few(missing)} (see price missing)"] if missing else []


async def fetched_catalog(settings: Settings) -> bytes:
    """Return the catalogue at a URL. Raises CatalogError if there is none."""
    upstreams = Upstreams(settings.upstreams)
    try:
        return await fetch_catalog(settings.codex.catalog, upstreams)
    finally:
        for upstream in upstreams:
            await upstream.close()


PATTERNS_WITH_PRICE = """
    SELECT DISTINCT model FROM prices
     WHERE tier = ? AND above_input_tokens = 0 AND effective_at <= ?"""


def patterns_with_price(path: Path) -> list[str]:
    """Return the names and patterns of models that have a price now."""
    found = rows_of(path, PATTERNS_WITH_PRICE, DEFAULT_TIER, now_ms())
    return [model for (model,) in found]


async def ask_all(settings: Settings) -> list[AskedUpstream]:
    """Ask all members for their models, at the same time."""
    upstreams = list(Upstreams(settings.upstreams))
    try:
        return await asyncio.gather(*map(ask_member, upstreams))
    finally:
        for upstream in upstreams:
            await upstream.close()


async def ask_member(upstream: Upstream) -> AskedUpstream:
    """Ask a member for its models."""
    asked = AskedUpstream(upstream.name)
    if upstream.is_client:
        asked.ok, asked.code = True, "client_credentials"
        return asked
    if not upstream.usable:
        asked.code = "unusable"
        return asked
    try:
        asked.status, body = await upstream.fetch_whole("/models")
    except (httpx2.HTTPError, TimeoutError) as error:
        asked.code = cause_of(error)
        return asked
    if asked.status != 200:
        asked.code = error_code_in(body)
        return asked
    try:
        asked.models = len(upstream.models_in(body))
        asked.ok = True
    except NO_LIST:
        asked.code = "not_a_list"
    return asked
