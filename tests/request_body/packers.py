"""The encodings in which clients may send a body."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Packer = Callable[[bytes], bytes]
PACKERS: dict[str, Packer] = {"gzip": gzip.compress, "zstd": zstd.compress}
UNPACKERS: dict[str | None, Packer] = {"gzip": gzip.decompress, "zstd": zstd.decompress}
