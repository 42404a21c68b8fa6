"""All that one process serves: the gateway, the admin API, the dashboard and what monitors ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from redbtc.admin.api import API
from redbtc.billing.billing import Billing
from redbtc.billing.webhook import post_for_ever
from redbtc.config import Settings
from redbtc.gateway.admin_routes import AdminRoutes
from redbtc.gateway.daily_work import DailyWork
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.health import HealthRoutes
from redbtc.gateway.models import Models
from redbtc.gateway.operator_metrics import OperatorMetrics
from redbtc.gateway.progress import save_progress
from redbtc.gateway.site_routes import SiteRoutes
from redbtc.gateway.upstream_metrics import UpstreamMetrics
from redbtc.gateway.view import GatewayView
from redbtc.gateway.vitals import Vitals, watch_size
from redbtc.gateway.watching import Watch
from redbtc.store.clock import watch_clock
from redbtc.store.erasure import erase_due
from redbtc.store.request_log import RequestLog
from redbtc.telemetry import Telemetry, log, watch_log


class Service:
    """The gateway, and what is served beside the requests that it forwards."""

    def __init__(
        self,
        billing: Billing,
        settings: Settings,
        telemetry: Telemetry,
        on_task_end: Callable[[asyncio.Task[Any]], None],
        request_log: RequestLog,
    ) -> None:
        """`on_task_end`: see Gateway."""
        self.gateway = Gateway(billing, settings, telemetry, on_task_end, request_log)
        view = GatewayView(self.gateway)
        self.api = API(billing, view, settings.dashboard_url, request_log)
        self.models = Models(self.gateway)
        self.admin_routes = AdminRoutes(self.gateway, self.api)
        self.health_routes = HealthRoutes(self.gateway, self.admin_routes.lazy_dashboard)
        self.site_routes = SiteRoutes(self.gateway, self.admin_routes.lazy_dashboard)
        self.vitals = Vitals(billing.store, request_log)
        self.watch = Watch(billing.store, billing.messages)
        telemetry.registry.register(self.vitals)
        telemetry.registry.register(OperatorMetrics(self.gateway, self.watch))
        telemetry.registry.register(UpstreamMetrics(self.gateway.upstreams))

    def start_tasks(self) -> list[asyncio.Task[None]]:
        """Start what the process does for as long as it serves, and return the tasks. None of them
        ends by itself."""
        gateway, store = self.gateway, self.gateway.store
        erase_accounts = partial(
            erase_due, store, gateway.request_log, self.api.gateway.end_account
        )
        daily_work = DailyWork(gateway, self.api.retention, erase_accounts)
        return [
            asyncio.create_task(work, name=name)
            for name, work in {
                "daily work": daily_work.do_for_ever(),
                "expired bodies": daily_work.erase_bodies_for_ever(),
                "webhook": post_for_ever(gateway.billing, log),
                "progress": save_progress(store, gateway.in_flight.with_row, gateway.background),
                "clock": watch_clock(store.clock, log),
                "size": watch_size(store),
                "watch": self.watch.watch_for_ever(),
                "model catalog": gateway.catalog.keep_fresh(),
                "loop lag": self.vitals.watch_loop(),
                "log": watch_log(),
            }.items()
        ]
