"""Declare the operations of the admin API in one table, and perform them for HTTP and pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Concatenate, ParamSpec

from msgspec import Struct

from redbtc.admin.actors import Actor
from redbtc.admin.api_accounts import AccountOperations
from redbtc.admin.api_closing import ClosingOperations
from redbtc.admin.api_codex import CodexOperations
from redbtc.admin.api_compromised import CompromisedKeyOperations, KeyCompromised, KeyLeak
from redbtc.admin.api_documents import DocumentOperations
from redbtc.admin.api_export import ExportOperations, ExportPlan, InstantQuery, PartQuery
from redbtc.admin.api_log import RequestLogOperations
from redbtc.admin.api_money import MoneyOperations
from redbtc.admin.api_process import ProcessOperations
from redbtc.admin.api_retention import Purge, PurgeOptions, RetentionOperations
from redbtc.admin.api_upstreams import UpstreamOperations
from redbtc.admin.api_usage import UsageOperations
from redbtc.admin.api_users import UserOperations
from redbtc.admin.api_webhook import WebhookOperations
from redbtc.admin.inputs import (
    AccountChange,
    AccountsQuery,
    ChangesQuery,
    CodexConfigQuery,
    NewAccount,
    NewestQuery,
    NewKey,
    NewNotice,
    NewPassword,
    NewPayment,
    NewPrices,
    NewRest,
    NewTime,
    NewUser,
    Nothing,
    OverviewQuery,
    RequestsQuery,
    Revocation,
    Rotation,
    StatementQuery,
    SumsQuery,
    Suspension,
    Throttle,
    UsersQuery,
    WhichPriceQuery,
    WhichUser,
)
from redbtc.admin.inputs_closing import AccountTerminated, Termination
from redbtc.admin.inputs_documents import Accepted
from redbtc.admin.inputs_log import RequestLogChange
from redbtc.admin.operations import Given, Operation, Result, operation
from redbtc.admin.outputs import (
    AccountList,
    AccountWithMoney,
    ChangeList,
    Check,
    CodexConfig,
    Done,
    KeyList,
    KeyRevoked,
    MeShown,
    MonthList,
    NoticeList,
    NoticeWithdrawn,
    Overview,
    PaymentAdded,
    PaymentList,
    Reloaded,
    RequestReport,
    SessionList,
    UnpricedModelList,
    UpstreamAtWork,
    UpstreamChangeList,
    UpstreamList,
    UpstreamRested,
    UsageReport,
    UserList,
    WebhookMessageList,
)
from redbtc.admin.outputs_documents import AcceptanceList, DocumentList, ToAccept
from redbtc.admin.outputs_log import BodyContent, RequestDetails, RequestLogShown
from redbtc.admin.set_time import TimeSet
from redbtc.admin.users import UserAdded, UserShown
from redbtc.admin.validation import read_json_body, read_values
from redbtc.billing.records import Balance, ModelsInUse, Notice, PriceList, PricesAdded, WhichPrice
from redbtc.billing.statements import Statement
from redbtc.billing.webhook_messages import WebhookAnswer
from redbtc.store.accounts import Account, KeyAdded

Arguments = ParamSpec("Arguments")


class API(
    AccountOperations,
    ClosingOperations,
    CompromisedKeyOperations,
    ExportOperations,
    MoneyOperations,
    UserOperations,
    UsageOperations,
    UpstreamOperations,
    WebhookOperations,
    CodexOperations,
    DocumentOperations,
    RetentionOperations,
    ProcessOperations,
    RequestLogOperations,
):
    """The methods of all operations. Call them through one of the `perform` methods, which check
    the actor's role: `await api.perform(API.show_account, actor, account="first")`."""

    async def perform(
        self,
        handler: Callable[Concatenate[API, Actor, Arguments], Awaitable[Result]],
        actor: Actor,
        *arguments: Arguments.args,
        **path: Arguments.kwargs,
    ) -> Result:
        """Return the result of an operation. Raises Forbidden if the actor's role is too low, and
        any UserError that the operation raises."""
        actor.require(BY_HANDLER[handler].min_rank)
        return await handler(self, actor, *arguments, **path)

    async def perform_text(
        self,
        handler: Callable[Concatenate[API, Actor, Given, Arguments], Awaitable[Result]],
        actor: Actor,
        values: Mapping[str, Any],
        *arguments: Arguments.args,
        **path: Arguments.kwargs,
    ) -> Result:
        """Return the result of an operation whose input is the values of a form or a query; they
        may all be text. Raises UserError as `perform` does, and Invalid for malformed input."""
        declared = BY_HANDLER[handler]
        actor.require(declared.min_rank)
        given: Any = read_values(values, declared.input)
        return await handler(self, actor, given, *arguments, **path)

    async def perform_request(
        self,
        declared: Operation,
        actor: Actor,
        path: Mapping[str, str],
        query: Mapping[str, str],
        body: bytes,
    ) -> Struct | dict[str, Any] | AsyncIterator[bytes]:
        """Return the answer to an HTTP request, or its JSON part by part. Raises UserError as
        `perform` does, Invalid for malformed input, and Forbidden for an owner who has documents to
        accept first."""
        actor.require(declared.min_rank)
        if not declared.before_acceptance:
            self.require_acceptance(actor)
        inputs = read_values(query, declared.query), read_json_body(body, declared.body)
        given = [each for each in inputs if type(each) is not Nothing]
        if declared.stream and actor.is_command:
            return declared.stream(self, actor, *given, **path)
        answer: Struct | dict[str, Any] = await declared.handler(self, actor, *given, **path)
        return answer


OPERATIONS = (
    operation("GET", "/accounts", "operator", API.list_accounts, AccountList, query=AccountsQuery),
    operation(
        "POST",
        "/accounts",
        "operator",
        API.add_account,
        AccountWithMoney,
        body=NewAccount,
        status=201,
    ),
    operation("GET", "/accounts/{account}", "viewer", API.show_account, AccountWithMoney),
    operation(
        "PATCH",
        "/accounts/{account}",
        "operator",
        API.set_account,
        AccountWithMoney,
        body=AccountChange,
    ),
    operation(
        "POST",
        "/accounts/{account}/suspend",
        "operator",
        API.suspend_account,
        Account,
        body=Suspension,
    ),
    operation("POST", "/accounts/{account}/resume", "operator", API.resume_account, Account),
    operation(
        "POST",
        "/accounts/{account}/throttle",
        "operator",
        API.throttle_account,
        Account,
        body=Throttle,
    ),
    operation(
        "POST",
        "/accounts/{account}/terminate",
        "operator",
        API.terminate_account,
        AccountTerminated,
        body=Termination,
        stream=API.stream_termination,
    ),
    operation("POST", "/accounts/{account}/closing", "owner", API.ask_for_closing, Account),
    operation("DELETE", "/accounts/{account}/closing", "owner", API.withdraw_closing, Account),
    operation(
        "GET",
        "/accounts/{account}/export",
        "owner",
        API.plan_export,
        ExportPlan,
        query=InstantQuery,
    ),
    operation(
        "GET",
        "/accounts/{account}/export/{part}",
        "owner",
        API.export_part,
        AsyncIterator[bytes],
        query=PartQuery,
        media_type="application/zip",
    ),
    operation(
        "GET",
        "/accounts/{account}/export.zip",
        "owner",
        API.export_account,
        AsyncIterator[bytes],
        media_type="application/zip",
    ),
    operation("GET", "/accounts/{account}/limits", "viewer", API.account_limits, dict[str, Any]),
    operation("GET", "/accounts/{account}/keys", "viewer", API.list_keys, KeyList),
    operation(
        "POST", "/accounts/{account}/keys", "owner", API.add_key, KeyAdded, body=NewKey, status=201
    ),
    operation("POST", "/keys/{key}/revoke", "owner", API.revoke_key, KeyRevoked, body=Revocation),
    operation(
        "POST", "/keys/{key}/rotate", "owner", API.rotate_key, KeyAdded, body=Rotation, status=201
    ),
    operation(
        "POST",
        "/keys/{key}/compromised",
        "owner",
        API.compromise_key,
        KeyCompromised,
        body=KeyLeak,
    ),
    operation("GET", "/prices", "operator", API.list_prices, PriceList),
    operation(
        "GET",
        "/accounts/{account}/prices",
        "key",
        API.account_prices,
        PriceList,
        key_path="/me/prices",
    ),
    operation(
        "GET", "/prices/which", "operator", API.which_price, WhichPrice, query=WhichPriceQuery
    ),
    operation("GET", "/prices/missing", "operator", API.list_missing_prices, UnpricedModelList),
    operation("GET", "/prices/in-use", "operator", API.models_in_use, ModelsInUse),
    operation(
        "POST", "/prices", "operator", API.add_prices, PricesAdded, body=NewPrices, status=201
    ),
    operation("GET", "/payments", "operator", API.list_payments, PaymentList),
    operation(
        "GET",
        "/accounts/{account}/payments",
        "key",
        API.account_payments,
        PaymentList,
        key_path="/me/payments",
    ),
    operation(
        "POST",
        "/accounts/{account}/payments",
        "operator",
        API.add_payment,
        PaymentAdded,
        body=NewPayment,
        status=201,
    ),
    operation("GET", "/accounts/{account}/statements", "viewer", API.list_months, MonthList),
    operation(
        "GET",
        "/accounts/{account}/statements/{month}",
        "key",
        API.statement,
        Statement,
        query=StatementQuery,
        key_path="/me/statements/{month}",
    ),
    operation("GET", "/me/balance", "key", API.balance, Balance),
    operation("GET", "/notices", "operator", API.list_notices, NoticeList),
    operation(
        "GET",
        "/accounts/{account}/notices",
        "key",
        API.account_notices,
        NoticeList,
        key_path="/me/notices",
    ),
    operation("POST", "/notices", "operator", API.add_notice, Notice, body=NewNotice, status=201),
    operation(
        "POST", "/notices/{notice}/withdraw", "operator", API.withdraw_notice, NoticeWithdrawn
    ),
    operation("GET", "/users", "owner", API.list_users, UserList, query=UsersQuery),
    operation("POST", "/users", "owner", API.add_user, UserAdded, body=NewUser, status=201),
    operation("DELETE", "/users/{user}", "owner", API.remove_user, UserShown, query=WhichUser),
    operation(
        "POST",
        "/users/{user}/reset",
        "owner",
        API.reset_user,
        UserAdded,
        query=WhichUser,
        status=201,
    ),
    operation("POST", "/login/password", "viewer", API.change_password, Done, body=NewPassword),
    operation("GET", "/login/sessions", "viewer", API.list_sessions, SessionList),
    operation("DELETE", "/login/sessions/{session}", "viewer", API.end_session, Done),
    operation("GET", "/documents", "operator", API.list_documents, DocumentList),
    operation(
        "GET", "/accounts/{account}/acceptances", "owner", API.list_acceptances, AcceptanceList
    ),
    operation(
        "GET",
        "/login/acceptances",
        "owner",
        API.show_to_accept,
        ToAccept,
        before_acceptance=True,
    ),
    operation(
        "POST",
        "/login/acceptances",
        "owner",
        API.accept_documents,
        ToAccept,
        body=Accepted,
        before_acceptance=True,
    ),
    operation(
        "GET", "/usage", "key", API.usage, UsageReport, query=SumsQuery, key_path="/me/usage"
    ),
    operation(
        "GET",
        "/requests",
        "key",
        API.requests,
        RequestReport,
        query=RequestsQuery,
        key_path="/me/requests",
        stream=API.stream_requests,
    ),
    operation("GET", "/requests/{request}", "viewer", API.show_request, RequestDetails),
    operation(
        "GET",
        "/requests/{request}/bodies/{body}",
        "owner",
        API.read_stored_body,
        BodyContent,
        media_type="application/octet-stream",
    ),
    operation(
        "GET", "/accounts/{account}/request-log", "owner", API.show_request_log, RequestLogShown
    ),
    operation(
        "PATCH",
        "/accounts/{account}/request-log",
        "owner",
        API.set_request_log,
        RequestLogShown,
        body=RequestLogChange,
    ),
    operation("GET", "/me", "key", API.me, MeShown),
    operation("GET", "/me/limits", "key", API.limits, dict[str, Any]),
    operation(
        "GET", "/codex-config", "operator", API.codex_config, CodexConfig, query=CodexConfigQuery
    ),
    operation("GET", "/overview", "operator", API.overview, Overview, query=OverviewQuery),
    operation("GET", "/changes", "operator", API.list_changes, ChangeList, query=ChangesQuery),
    operation("GET", "/upstreams", "operator", API.list_upstreams, UpstreamList),
    operation(
        "POST",
        "/upstreams/{upstream}/rest",
        "operator",
        API.rest_upstream,
        UpstreamRested,
        body=NewRest,
    ),
    operation(
        "POST", "/upstreams/{upstream}/resume", "operator", API.resume_upstream, UpstreamAtWork
    ),
    operation(
        "GET",
        "/upstreams/changes",
        "operator",
        API.list_upstream_changes,
        UpstreamChangeList,
        query=NewestQuery,
    ),
    operation(
        "GET",
        "/webhook",
        "operator",
        API.list_webhook_messages,
        WebhookMessageList,
        query=NewestQuery,
    ),
    operation("POST", "/webhook/test", "operator", API.test_webhook, WebhookAnswer),
    operation("POST", "/db/check", "operator", API.check_database, Check),
    operation("POST", "/reload", "operator", API.reload, Reloaded),
    operation("POST", "/db/set-time", "operator", API.set_time, TimeSet, body=NewTime),
    operation("POST", "/db/purge", "operator", API.purge, Purge, body=PurgeOptions),
)
BY_HANDLER: dict[Callable[..., Any], Operation] = {each.handler: each for each in OPERATIONS}
