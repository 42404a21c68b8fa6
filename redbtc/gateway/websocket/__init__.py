"""OpenAI's WebSocket mode of /v1/responses: a session of requests over one connection."""
