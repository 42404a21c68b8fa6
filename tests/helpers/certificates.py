"""Certificates for tests of TLS, made with openssl."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest


class Authority:
    """A certificate authority, and a server's certificate for localhost that it has signed."""

    def __init__(self, folder: Path) -> None:
        if not shutil.which("openssl"):
            pytest.skip("no openssl")
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "ca.pem"  # what clients trust
        self._key, self.server = folder / "ca.key", folder / "server.pem"
        self._make(self._key, self.file, "/CN=Test authority")
        server_key = folder / "server.key"
        name = "subjectAltName=DNS:localhost"
        signed_by = ("-CA", str(self.file), "-CAkey", str(self._key), "-addext", name)
        self._make(server_key, self.server, "/CN=localhost", *signed_by)
        self.server.write_text(self.server.read_text() + server_key.read_text())

    def _make(self, key: Path, certificate: Path, subject: str, *more: str) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-keyout", str(key), "-out", str(certificate), "-subj", subject, *more]
        subprocess.run(command, check=True, capture_output=True)

    def server_context(self) -> ssl.SSLContext:
        """Return the TLS context of a server at localhost."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server)
        return context
