"""Codex CLI's model catalogue: what `codex debug models` prints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from redbtc.codex.config_toml import BUILT_IN_MODELS
from redbtc.codex.model_info import read_info, unknown_values
from redbtc.config import SettingsError, is_web_address
from redbtc.errors import UserError

# Bytes of a catalogue for which Codex makes room (codex-rs, model-provider/src/models_endpoint.rs).
# Versions 0.169.0 and 0.171.0 were seen to take more.
MAX_BODY = 1 << 20
MAX_FILE = 4 << 20  # bytes of a catalogue that is read, before models are left out
MAX_ENTRIES = 1000
MAX_LEVELS_READ = 127  # objects and lists within each other, which Codex reads
SETTING = "codex.catalog"
BEGIN, END = b'{"models":[', b"]}"
# What is raised where a text can't be read, such as one that is nested too deeply.
NOT_READ = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class CatalogError(UserError):
    """Bytes are not a catalogue that Codex can read. `problems` has a line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems[0])
        self.problems = problems


class CatalogModel(NamedTuple):
    """A model of the catalogue. `raw` are the bytes of its entry, which are passed on as they
    are."""

    slug: str
    priority: int  # Codex offers the lowest first
    is_offered: bool  # to users of an API key
    unknown: tuple[tuple[str, str], ...]  # fields with a value that the measured Codex doesn't know
    raw: bytes
    digest: bytes

    @classmethod
    def of(cls, raw: bytes) -> CatalogModel:
        """Return the model of an entry. Raises one of NOT_READ."""
        info = read_info(raw)
        unknown = tuple(unknown_values(info))
        digest = hashlib.sha256(raw).digest()
        return cls(info.slug, info.priority, info.is_offered, unknown, raw, digest)


class CatalogFile(msgspec.Struct):
    """The outermost object of a catalogue."""

    models: list[msgspec.Raw]


def parse_catalog(text: bytes) -> tuple[CatalogModel, ...]:
    """Return the models of a catalogue in their order. Raises CatalogError if Codex could not read
    it: each entry must have every field that Codex requires, with the right type."""
    if len(text) > MAX_FILE:
        raise CatalogError([f"has {len(text)} bytes; allowed are {MAX_FILE}"])
    try:
        entries = msgspec.json.decode(text, type=CatalogFile).models
        check_form(text)
    except NOT_READ as error:
        shape = 'expected what `codex debug models` prints, {"models": [...]}'
        raise CatalogError([f"{shape}: {plain_reason(error)}"]) from None
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise CatalogError([f"has {len(entries)} models; allowed are 1 to {MAX_ENTRIES}"])
    models, problems = [], []
    for number, entry in enumerate(entries):
        raw = bytes(entry)
        try:
            models.append(CatalogModel.of(raw))
        except NOT_READ as error:
            problems.append(f"{name_of(raw, number)}: {plain_reason(error)}")
    slugs = [each.slug for each in models]
    problems += [f"model {name!r}: duplicate" for name in {*slugs} if slugs.count(name) > 1]
    if problems:
        raise CatalogError(problems)
    return tuple(models)


def check_form(text: bytes) -> None:
    """Raise DecodeError for JSON that Codex does not read though its fields are right: with a name
    that is twice in an object, nested too deeply, or with bytes that are no UTF-8."""

    def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(members)
        if len(found) < len(members):
            names = [name for name, _ in members]
            twice = next(name for name in names if names.count(name) > 1)
            raise msgspec.DecodeError(f"{twice!r} is twice in an object")
        return found

    level: list[Any] = [json.loads(text.decode(), object_pairs_hook=unique)]
    for _ in range(MAX_LEVELS_READ):
        insides = [each.values() if type(each) is dict else each for each in level]
        level = [each for inside in insides for each in inside if type(each) in (dict, list)]
    if level:
        raise msgspec.DecodeError(f"nested in more than {MAX_LEVELS_READ} levels")


def name_of(raw: bytes, number: int) -> str:
    """Return how a message names an entry that can't be read: by its slug if it has one."""
    try:
        slug = msgspec.json.decode(raw)["slug"]
    except (*NOT_READ, TypeError, KeyError):
        slug = None
    return f"model {slug!r}" if isinstance(slug, str) else f"models[{number}]"


def plain_reason(error: Exception) -> str:
    """Return why an entry can't be read, with the field's path first."""
    what, _, place = str(error).partition(" - at `$.")
    missing = re.fullmatch("Object missing required field `(.*)`", what)
    path = place.rstrip("`")
    if missing:
        return f"{path}.{missing[1]}: missing".lstrip(".")
    return f"{path}: {what[:1].lower()}{what[1:]}" if path else what


def body_of(models: Iterable[CatalogModel]) -> bytes:
    """Return the catalogue of these models, as Codex reads it."""
    return BEGIN + b",".join([each.raw for each in models]) + END


def size_of(models: Iterable[CatalogModel]) -> int:
    """Return how many bytes `body_of` would return."""
    sizes = [len(each.raw) + 1 for each in models]
    return len(BEGIN) + max(sum(sizes) - 1, 0) + len(END)


def offered_models(models: Iterable[CatalogModel] | None) -> tuple[str, ...]:
    """Return the names of the models that Codex offers to users, in the order of its choice; those
    of its own catalogue if there is no other one."""
    if models is None:
        return BUILT_IN_MODELS
    offered = [each for each in models if each.is_offered]
    return tuple(each.slug for each in sorted(offered, key=lambda each: each.priority))


def etag_of(models: Iterable[CatalogModel]) -> bytes:
    """Return the strong ETag of `body_of` these models. Codex compares it with the header
    x-models-etag byte by byte, quotes included."""
    digest = hashlib.sha256(b"".join([each.digest for each in models]))
    return b'"%b"' % digest.hexdigest()[:32].encode()


def read_catalog(place: str) -> tuple[CatalogModel, ...] | None:
    """Return the models of the catalogue that the setting `codex.catalog` names, None if it names
    none or one that has to be fetched. Raises SettingsError."""
    if not place or is_web_address(place):
        return None
    try:
        return parse_catalog(Path(place).read_bytes())
    except OSError as error:
        raise SettingsError(f"{SETTING}: {place}: {error.strerror}") from None
    except CatalogError as error:
        raise SettingsError(f"{SETTING}: {place}: {error}") from None
