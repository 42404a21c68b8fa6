"""An entry of Codex CLI's model catalogue, with the types that Codex requires.

The fields and types were measured with Codex CLI 0.169.0 and 0.171.0: each field of each entry was
left out, set to null and set to each other type. Codex drops the whole catalogue if it can't read
one entry. Fields that are not named here can have any value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

MEASURED_VERSION = "0.171.0"  # the newest version with which this was measured
Int32 = Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class ReasoningLevel(Struct):
    """A level of reasoning that the model supports."""

    effort: str
    description: str


class TruncationPolicy(Struct):
    """How much of a tool's output is kept."""

    mode: str
    limit: Int64


class ServiceTier(Struct):
    """A service tier that users can choose."""

    id: str
    name: str
    description: str


class Availability(Struct):
    """A message to users about the model."""

    message: str


class Upgrade(Struct):
    """The model to which users are asked to change."""

    model: str
    migration_markdown: str


class ModelMessages(Struct):
    """What the model is told, as templates."""

    instructions_template: str | None = None


class ModelInfo(Struct):
    """An entry of the catalogue. The fields without a default are required."""

    slug: Annotated[str, Meta(min_length=1, max_length=256)]
    display_name: str
    supported_reasoning_levels: list[ReasoningLevel]
    shell_type: str
    visibility: str
    supported_in_api: bool
    priority: Int32
    support_verbosity: bool
    truncation_policy: TruncationPolicy
    experimental_supported_tools: list[str]
    description: str | None = None
    default_reasoning_level: str | None = None
    additional_speed_tiers: list[str] | UnsetType = UNSET
    service_tiers: list[ServiceTier] | UnsetType = UNSET
    default_service_tier: str | None = None
    availability_nux: Availability | None = None
    upgrade: Upgrade | None = None
    base_instructions: str | None = None
    model_messages: ModelMessages | None = None
    include_skills_usage_instructions: bool | UnsetType = UNSET
    include_plugin_usage_instructions: bool | UnsetType = UNSET
    include_apps_usage_instructions: bool | UnsetType = UNSET
    default_reasoning_summary: str | UnsetType = UNSET
    default_verbosity: str | None = None
    apply_patch_tool_type: str | None = None
    web_search_tool_type: str | UnsetType = UNSET
    supports_image_detail_original: bool | UnsetType = UNSET
    context_window: Int64 | None = None
    max_context_window: Int64 | None = None
    effective_context_window_percent: Int64 | UnsetType = UNSET
    comp_hash: str | None = None
    input_modalities: list[str] | UnsetType = UNSET
    supports_search_tool: bool | UnsetType = UNSET
    supports_experimental_context: bool | UnsetType = UNSET
    use_responses_lite: bool | UnsetType = UNSET
    supports_reasoning_effort_updates: bool | UnsetType = UNSET
    node_repl_auto_review_required: bool | UnsetType = UNSET
    node_repl_disabled: bool | UnsetType = UNSET
    tool_mode: str | None = None
    multi_agent_version: str | None = None
    multi_agent_reasoning_effort: str | None = None
    model_specialty: str | None = None

    def __post_init__(self) -> None:
        template = self.model_messages and self.model_messages.instructions_template
        if self.base_instructions is None and template is None:
            raise ValueError("needs base_instructions or model_messages.instructions_template")

    @property
    def is_offered(self) -> bool:
        """Return whether Codex offers the model to users of an API key."""
        return self.visibility == "list" and self.supported_in_api


# The values that Codex knows, of the fields for which it knows some only. A newer Codex may know
# more, so another value is no error.
KNOWN_VALUES: dict[str, tuple[str, ...]] = {
    "shell_type": ("default", "local", "shell_command", "unified_exec", "disabled"),
    "visibility": ("list", "hide", "none"),
    "truncation_policy.mode": ("bytes", "tokens"),
    "default_reasoning_summary": ("auto", "concise", "detailed", "none"),
    "default_verbosity": ("low", "medium", "high"),
    "apply_patch_tool_type": ("freeform",),
    "web_search_tool_type": ("text", "text_and_image"),
    "input_modalities": ("text", "image", "audio"),
}


def unknown_values(info: ModelInfo) -> Iterator[tuple[str, str]]:
    """Yield each field with a value that the measured version of Codex does not know."""
    for path, known in KNOWN_VALUES.items():
        value: Any = info
        for name in path.split("."):
            value = getattr(value, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and each not in known:
                yield path, each


def read_info(raw: bytes | msgspec.Raw) -> ModelInfo:
    """Return an entry of the catalogue. Raises msgspec.DecodeError."""
    return msgspec.json.decode(raw, type=ModelInfo)
