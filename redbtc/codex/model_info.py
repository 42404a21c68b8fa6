"""An entry of Codex CLI's model catalogue, with the types that Codex requires.

The fields and types were measured with Codex CLI 0.169.0 and 0.171.0: each field of each entry, and
each further field that 0.171.0 was found to check, was left out, set to null and set to each other
type. Codex drops the whole catalogue if it can't read one entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

MEASURED_VERSION = "0.171.0"  # the newest version with which this was measured
Int32 = Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


Effort = Annotated[str, Meta(min_length=1)]
Words = str | None


class ReasoningLevel(Struct):
    """A level of reasoning that the model supports."""

    effort: Effort
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


class Approvals(Struct):
    """What the model is told of approvals, by the policy."""

    on_request: Words = None
    on_request_auto_review: Words = None
    never: Words = None
    unless_trusted: Words = None
    auto_review_suffix: Words = None


class CollaborationModes(Struct):
    """What the model is told of the mode that it works in."""

    default: Words = None
    plan: Words = None


class AutoReview(Struct):
    """What the model that reviews a step is told."""

    policy: Words = None
    policy_template: Words = None
    rejection_instructions: Words = None
    timeout_instructions: Words = None
    node_repl_policy: Words = None


class Permissions(Struct):
    """What the model is told of its permissions."""

    danger_full_access: Words = None
    workspace_write: Words = None
    read_only: Words = None
    approved_prefixes: Words = None
    approved_command_prefix_saved: Words = None
    writable_root: Words = None
    writable_roots: Words = None
    omitted_paths: Words = None
    denied_reads: Words = None


class AgentRole(Struct):
    """What the model is told of its role among several agents."""

    root: Words = None
    subagent: Words = None


class MultiAgent(Struct):
    """What the model is told where several agents work."""

    role: AgentRole | None = None
    mode: dict[str, Any] | None = None


class TokenBudget(Struct):
    """When and how the model is told how many tokens are left."""

    reminder_threshold_tokens: Int64
    reminder_message_template: str
    guidance_message: str
    auto_compact_fallback_prompt: str
    auto_compact_fallback_buffer_tokens: Int64
    enabled: bool | UnsetType = UNSET
    use_history_notes_extension: bool | UnsetType = UNSET


class Guardian(Struct):
    """The classifier of what an agent does."""

    classifier_instructions: Words = None
    reuse_parent_compaction: bool | None = None
    max_tool_call_lag: Annotated[int, Meta(ge=0)] | None = None
    transcript: dict[str, Any] | None = None


class ConfirmationPolicies(Struct):
    """When the model must ask users."""

    browser_use: Words = None
    computer_use: Words = None


class ToolMessages(Struct):
    """What the model is told of tools."""

    history: dict[str, Any] | None = None
    mcp_resources: dict[str, Any] | None = None
    send_user_message_async: dict[str, Any] | None = None


class ModelMessages(Struct):
    """What the model is told, as templates."""

    instructions_template: Words = None
    persistent_instructions: Words = None
    content_filter_guidance: Words = None
    approvals: Approvals | None = None
    collaboration_modes: CollaborationModes | None = None
    auto_review: AutoReview | None = None
    permissions: Permissions | None = None
    multi_agent: MultiAgent | None = None
    token_budget: TokenBudget | None = None
    guardian_v2: Guardian | None = None
    confirmation_policies: ConfirmationPolicies | None = None
    tools: ToolMessages | None = None


class AccessPrograms(Struct):
    """The programs of OpenAI by which the model is available."""

    cyber: list[Any]


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
    default_reasoning_level: Effort | None = None
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
    multi_agent_reasoning_effort: Effort | None = None
    multi_agent_tools_in_code_mode: bool | None = None
    model_specialty: str | None = None
    auto_compact_token_limit: Int64 | None = None
    auto_review_model_override: str | None = None
    available_access_programs: AccessPrograms | None = None
    supports_reasoning_summary_parameter: bool | UnsetType = UNSET
    web_search_provider: str | None = None

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
    "web_search_provider": ("standalone", "search_mcp"),
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
