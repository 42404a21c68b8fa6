"""All that one process serves: the gateway, the admin API, the dashboard and what monitors ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
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
from redbtc.gateway.summary import summary
from redbtc.gateway.unpriced import write_unpriced_for_ever
from redbtc.gateway.upstream_metrics import UpstreamMetrics
from redbtc.gateway.uptime import UptimeWatch
from redbtc.gateway.view import GatewayView
from redbtc.gateway.vitals import Vitals, watch_size
from redbtc.gateway.watching import Watch
from redbtc.store.clock import watch_clock
from redbtc.store.erasure import erase_due
from redbtc.store.request_log import RequestLog
from redbtc.systemd import report_status
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
        self.uptime = UptimeWatch(self.gateway)
        dashboard, meter = self.admin_routes.lazy_dashboard, self.uptime.meter
        self.health_routes = HealthRoutes(self.gateway, dashboard, meter)
        self.site_routes = SiteRoutes(self.gateway, self.admin_routes.lazy_dashboard)
        self.vitals = Vitals(billing.store, request_log)
        self.watch = Watch(billing.store, billing.messages)
        telemetry.registry.register(self.vitals)
        telemetry.registry.register(OperatorMetrics(self.gateway, self.watch))
        telemetry.registry.register(UpstreamMetrics(self.gateway.upstreams))
        self._tasks: list[asyncio.Task[None]] = []
        self._sole_tasks: list[asyncio.Task[None]] = []

    def start_tasks(self, on_end: Callable[[asyncio.Task[Any]], None]) -> None:
        """Start what the process does for as long as it serves. None of the tasks ends by itself;
        if one does, `on_end` is called."""
        self._on_end, gateway, store = on_end, self.gateway, self.gateway.store
        self._tasks = self._started(
            {
                "progress": save_progress(store, gateway.in_flight.with_row, gateway.background),
                "clock": watch_clock(store.clock, log),
                "loop lag": self.vitals.watch_loop(),
                "log": watch_log(),
            }
        )
        self.start_sole_tasks()

    def start_sole_tasks(self) -> None:
        """Start what only one process may do."""
        gateway, store = self.gateway, self.gateway.store
        erase_accounts = partial(
            erase_due, store, gateway.request_log, self.api.gateway.end_account
        )
        daily_work = DailyWork(gateway, self.api.retention, erase_accounts)
        self._sole_tasks = self._started(
            {
                "daily work": daily_work.do_for_ever(),
                "expired bodies": daily_work.erase_bodies_for_ever(),
                "webhook": post_for_ever(gateway.billing, log),
                "size": watch_size(store),
                "unpriced models": write_unpriced_for_ever(gateway),
                "uptime": self.uptime.check_for_ever(),
                "watch": self.watch.watch_for_ever(),
                "model catalog": gateway.catalog.keep_fresh(),
                "systemd": report_status(partial(summary, gateway)),
            }
        )

    def _started(self, works: dict[str, Coroutine[Any, Any, None]]) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(work, name=name) for name, work in works.items()]
        for task in tasks:
            task.add_done_callback(self._on_end)
        return tasks

    def stop_sole_tasks(self) -> None:
        """Stop what only one process may do: another one does it from now on."""
        self._stop(self._sole_tasks)

    def stop_tasks(self) -> None:
        """Stop all tasks."""
        self._stop(self._tasks + self._sole_tasks)

    def _stop(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.remove_done_callback(self._on_end)
            task.cancel()
