"""The way to the upstreams."""
