"""The certificates that upstreams are checked against. Nothing is taken from the environment, such
as SSL_CERT_FILE."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path

import httpx2

from redbtc.config import SettingsError
from redbtc.upstream_settings import UpstreamSettings


def system_context() -> ssl.SSLContext:
    """Return a TLS context that trusts the system's certificates. This takes 30 ms."""
    return httpx2.create_ssl_context(trust_env=False)


def context_trusting(certificates: str) -> ssl.SSLContext:
    """Return a TLS context that trusts these certificates, in PEM, and no others. Raises
    ssl.SSLError, ValueError if there are none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificates)
    return context


def read_certificates(ca_file: str) -> str:
    """Return the text of a file of certificates in PEM. Raises SettingsError with one line that
    names the file and says what is wrong with it."""
    try:
        text = Path(ca_file).read_bytes().decode("ascii", "ignore")  # comments may not be ASCII
        context_trusting(text)
    except (ssl.SSLError, ValueError):
        reason = "no certificates in PEM format, or a broken one"
        raise SettingsError(f"upstreams.ca_file: {ca_file}: {reason}") from None
    except OSError as error:
        raise SettingsError(f"upstreams.ca_file: {ca_file}: {error.strerror}") from None
    return text


def check_ca_files(upstreams: Iterable[UpstreamSettings]) -> None:
    """Read each ca_file of the upstreams. Raises SettingsError for the first that is not as it
    should be."""
    for upstream in upstreams:
        if upstream.ca_file:
            read_certificates(upstream.ca_file)
