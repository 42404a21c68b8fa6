"""The base class of the tables of config.toml, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Variable = Annotated[str, Meta(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")]
Url = Annotated[str, Meta(pattern=r"^https?://[^\s/?#]+[^\s?#]*$")]


class SettingsTable(Struct, forbid_unknown_fields=True, frozen=True):
    """A table of the settings file."""
