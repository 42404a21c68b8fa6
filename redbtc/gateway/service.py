"""All that one process serves: the gateway, the admin API, the dashboard and what monitors ask."""

from __future__ import annotations

from redbtc.admin.api import API
from redbtc.billing.books import Billing
from redbtc.config import Settings
from redbtc.gateway.health import Health
from redbtc.gateway.models import Models
from redbtc.gateway.pages import Pages
from redbtc.gateway.state import Gateway
from redbtc.gateway.view import GatewayView
from redbtc.gateway.vitals import Vitals
from redbtc.telemetry import Telemetry


class Service:
    """The gateway, and what is served beside the requests that it forwards."""

    def __init__(self, billing: Billing, settings: Settings, telemetry: Telemetry) -> None:
        self.gateway = Gateway(billing, settings, telemetry)
        self.api = API(billing, GatewayView(self.gateway), settings.dashboard_url)
        self.models = Models(self.gateway)
        self.pages = Pages(self.gateway, self.api)
        self.health = Health(self.gateway, self.pages.lazy_dashboard)
        self.vitals = Vitals(billing.store)
        telemetry.registry.register(self.vitals)
