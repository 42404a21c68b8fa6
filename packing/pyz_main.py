"""The first file of redbtc-proxy.pyz that Python runs, as __main__.py. It must be valid for old
versions of Python, also for Python 2, so that they say what is wrong."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = (sys.executable, sys.version_info[0], sys.version_info[1], sys.argv[0])
    sys.exit(
        "Error: redbtc-proxy needs Python 3.11 or newer; {} is Python {}.{}. "
        "Run it with a newer one: python3.11 {}".format(*found)
    )

from packing.pyz_unpack import main

main()
