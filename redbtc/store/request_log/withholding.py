"""Find what must never be stored: API keys of this gateway, and the credentials with which it
authenticates to upstreams."""

from __future__ import annotations

import os
import re

from redbtc.config import Settings
from redbtc.store.keys import KEY_PREFIX, hash_of_key

# The end is not consumed: the beginning of the next key can be part of what looks like a key.
KEY_FORM = re.compile(rb"%b(?=([0-9A-Za-z]{49}))" % KEY_PREFIX.encode())
KEY_BEGINNING = re.compile(rb"%b[0-9A-Za-z]{0,48}\Z" % KEY_PREFIX.encode())
KEY_BYTES = len(KEY_PREFIX) + 49
MIN_CREDENTIAL_BYTES = 8  # shorter values would be found in any text


class Secrets:
    """The secrets that settings name, and the form of API keys."""

    def __init__(self, settings: Settings) -> None:
        names = {
            name
            for upstream in settings.upstreams
            for name in (*upstream.key_variables, *upstream.header_variables)
        }
        values = {os.environb.get(name.encode(), b"").strip() for name in names}
        self._credentials = [each for each in values if len(each) >= MIN_CREDENTIAL_BYTES]
        # How many bytes at the end of a text can be the beginning of a secret.
        self.overlap = max(KEY_BYTES, *map(len, self._credentials), 0) - 1

    def are_in(self, text: bytes) -> bool:
        """Return whether a secret is in a text. A valid API key counts, whether it exists or not:
        it may be revoked, or be another gateway's."""
        if any(credential in text for credential in self._credentials):
            return True
        return any(hash_of_key((found[0] + found[1]).decode()) for found in KEY_FORM.finditer(text))

    def without_beginning(self, text: bytes) -> bytes:
        """Return a text of which the rest is not known without a secret that may begin at its end:
        most of a secret is as good as all of it."""
        if found := KEY_BEGINNING.search(text):
            text = text[: found.start()]
        for credential in self._credentials:
            for size in range(len(credential) - 1, MIN_CREDENTIAL_BYTES - 1, -1):
                if text.endswith(credential[:size]):
                    text = text[:-size]
        return text
