"""Render the Markdown of the operator's documents as HTML that is safe on any page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

# A scheme that runs nothing, or none at all. Browsers skip control characters in a scheme, but
# markdown-it has percent-encoded them.
SAFE_LINK = re.compile(r"(https?:|mailto:|[^:]*$|[^:]*[/?#])", re.IGNORECASE)


class RenderedMarkdown(NamedTuple):
    """A document as HTML. `has_title`: it has a heading of the first level."""

    html: str
    has_title: bool


def is_safe_link(url: str) -> bool:
    """Return whether a link leads to a web page, an email address, or a place on this site."""
    return SAFE_LINK.match(url) is not None


def alternative_text(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any
) -> str:
    """Return the text that stands for an image: pages load none (Content-Security-Policy)."""
    return escape(renderer.renderInlineAsText(tokens[index].children, options, env))


def markdown_parser() -> MarkdownIt:
    """Return a parser of CommonMark with tables, in which HTML is text, links are safe, and images
    are replaced by their alternative text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.validateLink = is_safe_link  # type: ignore[method-assign]
    parser.add_render_rule("image", alternative_text)
    return parser


def render_markdown(text: str) -> RenderedMarkdown:
    """Return the HTML of a text. Its time is proportional to the length of the text: about 2 s for
    the worst of MAX_DOCUMENT_BYTES."""
    parser = markdown_parser()
    env: dict[str, Any] = {}
    tokens = parser.parse(text, env)
    html = str(parser.renderer.render(tokens, parser.options, env))
    return RenderedMarkdown(html, any(each.tag == "h1" for each in tokens))
