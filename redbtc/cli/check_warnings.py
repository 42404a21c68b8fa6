"""What `check` warns of: nothing is wrong yet, but it will hurt. Each warning says what to do."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import resource
import shlex
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redbtc.config import LoadedSettings
from redbtc.store.backup import FILE_SUFFIXES, suffixed
from redbtc.store.backup_record import (
    FIRST_START,
    MAX_BACKUP_DAYS,
    read_backup_record,
    record_file,
)
from redbtc.store.consistency import rows_of
from redbtc.store.disk import disk_room
from redbtc.store.expiring_keys import EXPIRING_KEYS, EXPIRING_SOON_DAYS
from redbtc.store.schema import REQUEST_LOG
from redbtc.store.takeover import LATEST
from redbtc.times import DAY, iso_time, now_ms
from redbtc.upstream.certificates import context_trusting, read_certificates
from redbtc.upstream_settings import FROM_ENVIRONMENT, UpstreamSettings

MAX_BEHIND_MS = 60_000  # that the clock may be behind the ledger
CERTIFICATE_DAYS = 30  # before a certificate of a ca_file expires
MIN_DESCRIPTORS = 4096
MAX_KEYS_NAMED = 10
TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronised
OTHERS_CAN_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_CAN_READ = stat.S_IRGRP | stat.S_IROTH


def warnings_of(loaded: LoadedSettings) -> list[str]:
    """Return what will hurt, a line each. Nothing is written, and nobody is asked."""
    found = (
        warnings_of_clock,
        warnings_of_disk,
        warnings_of_permissions,
        warnings_of_backups,
        warnings_of_keys,
        warnings_of_upstreams,
        warnings_of_certificates,
        warnings_of_descriptors,
    )
    looks: tuple[Callable[[LoadedSettings], Iterator[str]], ...] = found
    return [line for look in looks for line in look(loaded)]


def warnings_of_clock(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of a clock that is behind the ledger, or that nothing keeps right."""
    for (latest,) in rows_of(loaded.database_path, LATEST):
        behind = latest - now_ms()
        if behind > MAX_BEHIND_MS:
            yield (
                f"the clock is {behind // 1000} s behind the ledger's latest entry, from "
                f"{iso_time(latest)}: correct the clock or, if the ledger is wrong, run db set-time"
            )
    if clock_is_synchronised() is False:
        yield (
            "the clock is not synchronised: it may be wrong, and statements with it. Install an "
            "NTP client, such as systemd-timesyncd or chrony"
        )


def clock_is_synchronised() -> bool | None:
    """Return whether the kernel knows that the clock is kept right; None if that can't be known."""
    if not sys.platform.startswith("linux"):
        return None
    timex = ctypes.create_string_buffer(512)  # struct timex; modes = 0: only read
    try:
        state: int = ctypes.CDLL(None).adjtimex(timex)
    except (AttributeError, OSError):
        return None
    return None if state < 0 else state != TIME_ERROR


def warnings_of_disk(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of a disk that is nearly full."""
    path = loaded.database_path
    if (room := disk_room(path)) and room.is_low():
        yield (
            f"the disk of {path.parent} has {room.free >> 20} MB free: make room on it. A full "
            "disk stops the gateway"
        )


def warnings_of_permissions(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of files that others can read or change."""
    path = loaded.database_path
    files = [suffixed(path, each) for each in FILE_SUFFIXES]
    files += path.parent.glob(f"{path.name}.owed-*")
    request_log = path.with_name(REQUEST_LOG)
    files += [request_log, suffixed(request_log, "-wal"), suffixed(request_log, "-shm")]
    for file in files:
        mode = mode_of(file)
        if mode & (OTHERS_CAN_READ | OTHERS_CAN_WRITE):
            yield f"{file}: other users may use it (mode {mode:o}): chmod 600 {quoted(file)}"
    folder = mode_of(path.parent)
    if folder & OTHERS_CAN_WRITE and not folder & stat.S_ISVTX:
        yield (
            f"{path.parent}: other users may replace the database and the commands' socket (mode "
            f"{folder:o}): chmod go-w {quoted(path.parent)}"
        )
    if loaded.file is None:
        return
    mode = mode_of(loaded.file)
    if mode & OTHERS_CAN_WRITE:
        yield (
            f"{loaded.file}: other users may change the settings: chmod go-w {quoted(loaded.file)}"
        )
    if mode & OTHERS_CAN_READ and (names := list(settings_with_secrets(loaded))):
        yield (
            f"{loaded.file}: other users may read it, and {', '.join(names)} may hold a secret: "
            f"chmod 600 {quoted(loaded.file)}"
        )


def quoted(file: Path) -> str:
    """Return the path of a file for a command that people copy."""
    return shlex.quote(str(file))


def mode_of(file: Path) -> int:
    """Return the mode of a file, 0 if there is none."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(file.stat().st_mode)
    return 0


def settings_with_secrets(loaded: LoadedSettings) -> Iterator[str]:
    """Yield the names of settings whose text in the file may hold a secret."""
    for number, upstream in enumerate(loaded.settings.upstreams):
        for name, text in upstream.headers.items():
            if text and not FROM_ENVIRONMENT.fullmatch(text):
                yield f"upstreams[{number}].headers.{name}"
        if "@" in upstream.proxy:
            yield f"upstreams[{number}].proxy"
    url = urlsplit(loaded.settings.billing.webhook_url)
    if url.query or "@" in url.netloc:
        yield "billing.webhook_url"


def warnings_of_backups(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of a backup that failed, and of none in the last days."""
    path = loaded.database_path
    record, now = read_backup_record(path), now_ms()
    first = next((started for (started,) in rows_of(path, FIRST_START) if started), None)
    last = record.good_at(now) or first
    if last and now - last > MAX_BACKUP_DAYS * DAY:
        when = iso_time(record.succeeded_at) or "never"
        yield (
            f"no backup for {(now - last) // DAY} days (last: {when}): run db backup, and let "
            "a timer do so every day"
        )
    if record.has_failed:
        yield (
            f"the last backup failed ({iso_time(record.failed_at)}): {record.reason}. Correct "
            f"that, and run db backup; {record_file(path).name} says what came of it"
        )


def warnings_of_keys(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of keys that expire soon."""
    now = now_ms()
    values = (now, now + EXPIRING_SOON_DAYS * DAY, 0)
    keys = list(rows_of(loaded.database_path, EXPIRING_KEYS, *values))
    for key_id, label, expires_at, account in keys[:MAX_KEYS_NAMED]:
        named = f"{key_id} ({label})" if label else key_id
        yield (
            f"key {named} of {account} expires at {iso_time(expires_at)}: create another one with "
            "key add"
        )
    if len(keys) > MAX_KEYS_NAMED:
        yield (
            f"{len(keys) - MAX_KEYS_NAMED} more keys expire within {EXPIRING_SOON_DAYS} days: see "
            "key list"
        )


def warnings_of_upstreams(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of upstreams without a key, and of keys that are sent in plain text."""
    for upstream in loaded.settings.upstreams:
        if is_on_this_machine(upstream.base_url):
            continue
        if upstream.credentials == "operator" and not has_key(upstream):
            yield (f'upstream "{upstream.name}" has no key: set api_key_env, unless it needs none')
        elif urlsplit(upstream.base_url).scheme == "http":
            yield (
                f'upstream "{upstream.name}": its key and all content are sent in plain text: use '
                "https in base_url"
            )


def has_key(upstream: UpstreamSettings) -> bool:
    """Return whether an upstream is sent a key, or headers that may hold one."""
    return bool(upstream.key_variables or upstream.api_key_envs or upstream.headers)


def is_on_this_machine(base_url: str) -> bool:
    """Return whether a URL leads to loopback."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warnings_of_certificates(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of certificates in a ca_file that expire soon, or have expired."""
    for ca_file in dict.fromkeys(each.ca_file for each in loaded.settings.upstreams):
        if not ca_file:
            continue
        for certificate in context_trusting(read_certificates(ca_file)).get_ca_certs():
            ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
            days = int((ends - time.time()) // 86400)
            if days < CERTIFICATE_DAYS:
                name = common_name(certificate)
                when = f"expires in {days} days" if days >= 0 else "has expired"
                yield (
                    f"{ca_file}: the certificate {name!r} {when}: put the next one into the file "
                    "as well, and reload"
                )


def common_name(certificate: Mapping[str, Any]) -> str:
    """Return the common name of a certificate's subject, as ssl shows it."""
    parts = dict(part for names in certificate["subject"] for part in names)
    return str(parts.get("commonName", "without a name"))


def warnings_of_descriptors(loaded: LoadedSettings) -> Iterator[str]:
    """Warn of a limit of open files that keeps clients out. A gateway raises it to the maximum."""
    del loaded
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    if maximum != resource.RLIM_INFINITY and maximum < MIN_DESCRIPTORS:
        yield (
            f"at most {maximum} files may be open in this session, of which half are for clients; "
            f"the limit of the service may be another. Allow {MIN_DESCRIPTORS} or more: "
            "LimitNOFILE in systemd, or ulimit -n"
        )
