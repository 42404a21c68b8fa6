"""The path of a request: authenticate, read, choose, admit, relay, settle. Begin reading with
metered_route.py."""
