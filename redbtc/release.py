"""The version of this program. CONTRIBUTING.md says when its parts change."""

from __future__ import annotations

RELEASE = "0.1.0"  # as in pyproject.toml
