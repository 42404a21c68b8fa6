"""Operations on the operator's terms and privacy policy, and on their acceptance by owners."""

from __future__ import annotations

from msgspec.structs import asdict

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor, Forbidden
from redbtc.admin.inputs_documents import Accepted
from redbtc.admin.outputs_documents import (
    AcceptanceList,
    DocumentCount,
    DocumentList,
    DocumentVersionShown,
    ToAccept,
)
from redbtc.billing.documents import Published
from redbtc.errors import UserError
from redbtc.store.json_values import json_time


class DocumentOperations(Access):
    """Operations on the operator's documents and their acceptance."""

    async def list_documents(self, actor: Actor) -> DocumentList:
        """List all published versions of the terms and the privacy policy."""
        counts = await self.billing.acceptances.counts()
        return DocumentList(
            [
                DocumentCount(
                    **asdict(self._shown(each)), owners=counts.get((each.name, each.version), 0)
                )
                for each in self.billing.documents.all()
            ]
        )

    async def list_acceptances(self, actor: Actor, account: str) -> AcceptanceList:
        """List which owners of an account have accepted which versions, and when."""
        found = await self.find_account(actor, account)
        return AcceptanceList(await self.billing.acceptances.of_account(found.id))

    async def show_to_accept(self, actor: Actor) -> ToAccept:
        """List the versions that you, an owner, have yet to accept."""
        return ToAccept([self._shown(each) for each in self.to_accept(actor)])

    async def accept_documents(self, actor: Actor, body: Accepted) -> ToAccept:
        """Accept the versions that you were shown. Returns what is still to be accepted."""
        session = actor.required_session()
        if session.role != "owner":
            raise Forbidden("only the owners of an account accept documents")
        given = {name: version for name, version in asdict(body).items() if version}
        if not given:
            raise UserError("name the version that you accept of at least one document")
        await self.billing.acceptances.accept(session.user_id, given, actor.name)
        return await self.show_to_accept(actor)

    def to_accept(self, actor: Actor) -> list[Published]:
        """Return the versions that an actor has yet to accept: none for one who is not logged in as
        an owner. Raises StorageUnavailable."""
        if actor.session is None or actor.session.role != "owner":
            return []
        return self.billing.acceptances.missing(actor.session.user_id)

    def require_acceptance(self, actor: Actor) -> None:
        """Raise Forbidden if the actor has documents to accept first."""
        if self.to_accept(actor):
            raise Forbidden(
                f"there are new documents to accept first, at {self.dashboard_url}accept or with "
                "POST /admin/v1/login/acceptances"
            )

    def _shown(self, each: Published) -> DocumentVersionShown:
        return DocumentVersionShown(
            document=each.name,
            version=each.version,
            effective_at=json_time(each.effective_at),
            published_at=json_time(each.published_at),
            url=f"{self.public_url}/{each.name}?version={each.version}",
        )
