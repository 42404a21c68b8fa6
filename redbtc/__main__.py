"""The command redbtc-proxy, where the package is installed."""

from __future__ import annotations

from redbtc.start import prepare


def main() -> None:
    """Prepare the process, then load and run the command line."""
    prepare()
    import redbtc_proxy  # takes long: after `prepare`

    redbtc_proxy.main()
