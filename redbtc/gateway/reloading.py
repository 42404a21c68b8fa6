"""Apply other settings to the running gateway, and publish the operator's documents."""

from __future__ import annotations

import logging
import sqlite3

from redbtc.billing.billing import Billing
from redbtc.billing.document_files import Document, date_text, read_documents
from redbtc.config import Settings, SettingsError, missing_keys, settings_at_restart
from redbtc.errors import StorageUnavailable
from redbtc.gateway.gateway import Gateway
from redbtc.telemetry import LOG, log
from redbtc.upstream.certificates import check_ca_files

PUBLISHER = "config.toml"  # in the log of changes


def apply_settings(gateway: Gateway, new: Settings) -> list[Document]:
    """Use other settings, and return the documents that they name, which may be published now.
    Raises SettingsError, and then keeps the old ones."""
    old = gateway.settings
    check_ca_files(new.upstreams)
    documents = read_documents(new.site)
    gateway.billing.documents.check(documents, new.billing.terms_notice_days)
    gateway.apply(new)
    LOG.level = getattr(logging, new.server.log_level.upper())
    log(logging.INFO, "reloaded", needs_restart=settings_at_restart(old, new))
    for line in missing_keys(new):
        log(logging.WARNING, "unusable", reason=line)
    return documents


async def publish_documents(
    billing: Billing, documents: list[Document], settings: Settings
) -> None:
    """Show the documents of [site] and no others, and publish and log those that are new. Raises
    SettingsError, StorageUnavailable, sqlite3.Error."""
    for each in await billing.documents.publish(documents, settings, PUBLISHER):
        effective = date_text(each.effective_at)
        log(
            logging.INFO, "published", document=each.name, version=each.version, effective=effective
        )


async def publish_reloaded(billing: Billing, documents: list[Document], settings: Settings) -> None:
    """Publish the documents of settings that are in force. If that fails, because the disk is full
    or another reload came first, the versions that are published stay."""
    try:
        await publish_documents(billing, documents, settings)
    except (SettingsError, StorageUnavailable, sqlite3.Error) as error:
        what_to_do = "reload the settings again"
        log(logging.ERROR, "documents not published", reason=str(error), what_to_do=what_to_do)
