"""What Codex CLI needs beside the API: its model catalogue and its configuration. No I/O but the
file of the catalogue."""
