"""RedBTC AI: an OpenAI-compatible API gateway. docs/architecture.md describes its packages."""
