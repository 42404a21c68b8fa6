"""Operations on the dashboard's logins and sessions."""

from __future__ import annotations

from msgspec.structs import replace

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor, Forbidden
from redbtc.admin.inputs import NewPassword, NewUser, UsersQuery, WhichUser
from redbtc.admin.outputs import Done, SessionList, UserList
from redbtc.admin.users import UserAdded, UserShown
from redbtc.errors import Conflict, NotFound, UserError


class UserOperations(Access):
    """Operations on the dashboard's logins and sessions."""

    async def list_users(self, actor: Actor, query: UsersQuery) -> UserList:
        """List logins. An owner sees the members of their account."""
        account_id = actor.account_id
        if query.account is not None:
            account_id = (await self.find_account(actor, query.account)).id
        return UserList(await self.users.all(account_id, query.role))

    async def add_user(self, actor: Actor, body: NewUser) -> UserAdded:
        """Add a login and return a one-time link to set its password."""
        if actor.account_id and body.role == "operator":
            raise Forbidden("only an operator can add an operator")
        if (body.role == "operator") == bool(body.account or actor.account_id):
            raise UserError("an operator has no account; an owner or viewer needs one")
        account_id = None
        if body.role != "operator":
            account_id = (await self.find_account(actor, body.account)).id
        return self._with_link(await self.users.add(body.email, body.role, account_id, actor.name))

    def _with_link(self, user: UserAdded) -> UserAdded:
        """Return the user with the address of their one-time link in place of its secret."""
        return replace(user, link=f"{self.dashboard_url}link/{user.link}")

    async def remove_user(self, actor: Actor, query: WhichUser, user: str) -> UserShown:
        """Remove a login, by id or email address, and end its sessions."""
        found = await self._other_user(actor, query, user)
        return await self.users.remove(found.id, actor.name)

    async def reset_user(self, actor: Actor, query: WhichUser, user: str) -> UserAdded:
        """Invalidate a login's password and sessions and return a new one-time link."""
        found = await self._other_user(actor, query, user)
        return self._with_link(await self.users.reset(found.id, actor.name))

    async def _other_user(self, actor: Actor, query: WhichUser, user: str) -> UserShown:
        """Return a user other than the actor. Resetting their own login would let an actor
        set a new password without the old one. Raises NotFound or Conflict."""
        found = await self.find_user(actor, query, user)
        if actor.session and actor.session.user_id == found.id:
            raise Conflict("you can't remove or reset your own login; ask somebody else to")
        return found

    async def change_password(self, actor: Actor, body: NewPassword) -> Done:
        """Change your password. All your sessions end."""
        session = actor.required_session()
        old, new = body.old_password, body.new_password
        await self.users.change_password(session, old, new, actor.network)
        return Done(ok=True)

    async def list_sessions(self, actor: Actor) -> SessionList:
        """List your active sessions."""
        session = actor.required_session()
        return SessionList(await self.users.sessions(session.user_id, session.id))

    async def end_session(self, actor: Actor, session: str) -> Done:
        """End one of your sessions."""
        if not await self.users.end_session(session, actor.required_session().user_id):
            raise NotFound("this session does not exist or has ended")
        return Done(ok=True)
