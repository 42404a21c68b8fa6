"""The operation on the process of the gateway."""

from __future__ import annotations

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor, Forbidden
from redbtc.admin.outputs import Reloaded


class ProcessOperations(Access):
    """The operation on the process of the gateway."""

    async def reload(self, actor: Actor) -> Reloaded:
        """Let a new process of the gateway take over, with the program and the settings that are on
        the disk now. Only a command may ask for that."""
        if not actor.is_command:
            raise Forbidden("only the command reload can do this")
        return await self.gateway.reload()
