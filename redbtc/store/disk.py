"""The room on the disk of the database."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

LOW_DISK_BYTES, LOW_DISK_SHARE = 256 << 20, 0.05  # free; the smaller of the two
MARGIN = 1.1  # so many times that much must be free before the disk counts as having room again


class DiskRoom(NamedTuple):
    """The size of a disk, and what is free of it for an unprivileged user, in bytes."""

    total: int
    free: int

    def is_low(self, was_low: bool = False) -> bool:
        """Return whether the disk is nearly full. `was_low` is whether it was before."""
        needed = min(LOW_DISK_BYTES, self.total * LOW_DISK_SHARE)
        return self.free < needed * (MARGIN if was_low else 1)


def disk_room(database: Path) -> DiskRoom | None:
    """Return the room on the disk of a database; None if it can't be read."""
    try:
        usage = shutil.disk_usage(database.parent)
    except OSError:
        return None
    return DiskRoom(usage.total, usage.free)
