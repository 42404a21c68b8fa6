"""For each alert of deploy/alerts.yml, series with which it fires. All other series are those of a
gateway that is well."""

from __future__ import annotations

SLOWEST, LATE = "RedBTCDiskFullSoon", "7h30m"  # it looks back for 6 hours, and waits for one
HOURS = 8  # for which the series go on, with a sample each minute
GIB, GB = 1 << 30, 10**9
INSTANCE = 'job="redbtc",instance="a:8080"'
# Series in the notation of promtool: begin+step x number of samples.
STEADY = f"x{HOURS * 60}"


def constant(value: float) -> str:
    return f"{value}+0{STEADY}"


def growing(step: float, begin: float = 0) -> str:
    return f"{begin}{step:+}{STEADY}"


WELL = {
    "up{}": constant(1),
    "redbtc_ledger_healthy{}": constant(1),
    "redbtc_upstreams_available{}": constant(1),
    'redbtc_upstream_state{upstream="a",state="up"}': constant(0),
    'redbtc_upstream_state{upstream="a",state="resting"}': constant(1),  # for one model
    'redbtc_upstream_state{upstream="a",state="out"}': constant(0),
    'redbtc_upstream_state{upstream="a",state="unusable"}': constant(0),
    'redbtc_upstream_attempts_total{upstream="a"}': growing(60),
    'redbtc_upstream_key_rejected{upstream="a"}': constant(0),
    'redbtc_upstream_failures_total{upstream="a",reason="insufficient_quota"}': constant(3),
    'redbtc_upstream_failures_total{upstream="a",reason="server_error"}': growing(1),
    'redbtc_requests_total{route="/v1/responses",status="200",outcome="completed"}': growing(60),
    "redbtc_internal_errors_total{}": constant(1),
    'redbtc_log_events_total{level="warning"}': growing(1),
    'redbtc_log_events_total{level="critical"}': constant(1),
    'redbtc_refusals_total{code="concurrency_limit_exceeded"}': growing(1),
    'redbtc_refusals_total{code="overloaded"}': constant(9),
    'redbtc_refusals_total{code="invalid_api_key"}': growing(600),
    "redbtc_queued{}": f"0 3 0 5{' 0 3 0 5' * (HOURS * 15)}",
    "redbtc_reading_bytes{}": constant(100),
    "redbtc_reading_limit_bytes{}": constant(1000),
    "redbtc_loop_lag_seconds{}": constant(0.01),
    'redbtc_ledger_commit_seconds_bucket{le="0.1"}': growing(600),
    'redbtc_ledger_commit_seconds_bucket{le="1"}': growing(600),
    'redbtc_ledger_commit_seconds_bucket{le="+Inf"}': growing(600),
    "redbtc_ledger_wal_bytes{}": constant(4 << 20),
    "redbtc_disk_low{}": constant(0),
    "redbtc_disk_free_bytes{}": growing(-(1 << 20), 100 * GIB),
    "redbtc_disk_total_bytes{}": constant(200 * GIB),
    "redbtc_backup_failed{}": constant(0),
    "redbtc_backup_age_seconds{}": growing(60, 86400),
    "redbtc_clock_offset_seconds{}": constant(-0.1),
    "redbtc_keys_expiring{}": constant(0),
    "redbtc_webhook_waiting{}": f"0 1 0 1{' 0 1 0 1' * (HOURS * 15)}",
    "redbtc_request_log_dropped_total{}": constant(7),
    "redbtc_ledger_repairs_total{}": constant(7),
    "redbtc_log_lines_dropped_total{}": constant(7),
    "process_open_fds{}": constant(100),
    "process_max_fds{}": constant(1000),
    "process_start_time_seconds{}": f"1+0x60 100+0{STEADY}",
}

FAILURES = 'redbtc_upstream_failures_total{upstream="a",reason='
CASES: dict[str, dict[str, str]] = {
    "RedBTCDown": {"up{}": constant(0)},
    "RedBTCLedgerUnhealthy": {"redbtc_ledger_healthy{}": constant(0)},
    "RedBTCNoUpstream": {"redbtc_upstreams_available{}": constant(0)},
    "RedBTCUpstreamOut": {'redbtc_upstream_state{upstream="a",state="out"}': constant(1)},
    "RedBTCUpstreamKeyRejected": {'redbtc_upstream_key_rejected{upstream="a"}': constant(1)},
    "RedBTCUpstreamQuota": {FAILURES + '"insufficient_quota"}': growing(0.2)},
    "RedBTCUpstreamFailures": {FAILURES + '"server_error"}': growing(9)},
    "RedBTCInternalErrors": {"redbtc_internal_errors_total{}": growing(0.2)},
    "RedBTCCriticalLog": {'redbtc_log_events_total{level="critical"}': growing(0.2)},
    "RedBTCFull": {'redbtc_refusals_total{code="overloaded"}': growing(9)},
    "RedBTCQueue": {"redbtc_queued{}": constant(1)},
    "RedBTCMemoryForBodies": {"redbtc_reading_bytes{}": constant(950)},
    "RedBTCLoopLag": {"redbtc_loop_lag_seconds{}": constant(0.6)},
    "RedBTCSlowCommits": {'redbtc_ledger_commit_seconds_bucket{le="0.1"}': growing(580)},
    "RedBTCWalFile": {"redbtc_ledger_wal_bytes{}": constant(101 * 10**6)},
    "RedBTCDiskLow": {"redbtc_disk_low{}": constant(1)},
    "RedBTCDiskFullSoon": {"redbtc_disk_free_bytes{}": growing(-80 << 20, 100 * GIB)},
    "RedBTCBackupFailed": {"redbtc_backup_failed{}": constant(1)},
    "RedBTCBackupOverdue": {"redbtc_backup_age_seconds{}": growing(60, 7 * 86400)},
    "RedBTCClock": {"redbtc_clock_offset_seconds{}": constant(-6)},
    "RedBTCKeysExpiring": {"redbtc_keys_expiring{}": constant(2)},
    "RedBTCWebhookFails": {"redbtc_webhook_waiting{}": constant(1)},
    "RedBTCRequestLogDropped": {"redbtc_request_log_dropped_total{}": growing(0.1)},
    "RedBTCRepairs": {"redbtc_ledger_repairs_total{}": growing(0.1)},
    "RedBTCLogDropped": {"redbtc_log_lines_dropped_total{}": growing(0.1)},
    "RedBTCDescriptors": {"process_open_fds{}": constant(900)},
    "RedBTCRestarts": {"process_start_time_seconds{}": growing(300)},
}

# Alerts that the first occurrence since the start must set off, minutes before they are looked at.
FIRST = f"0+0x95 1+0{STEADY}"
FIRST_CASES = {
    "RedBTCUpstreamQuota": {FAILURES + '"insufficient_quota"}': FIRST},
    "RedBTCInternalErrors": {"redbtc_internal_errors_total{}": FIRST},
    "RedBTCCriticalLog": {'redbtc_log_events_total{level="critical"}': FIRST},
}
# Other gateways that are well.
ALSO_WELL: dict[str, dict[str, str]] = {
    "all is well": {},
    "a small disk": {
        "redbtc_disk_free_bytes{}": constant(GB // 2),
        "redbtc_disk_total_bytes{}": constant(2 * GB),
    },
}


def series_of(changed: dict[str, str]) -> list[dict[str, str]]:
    """Return the series of a gateway, as a test of promtool has them."""
    assert changed.keys() <= WELL.keys()
    return [
        {
            "series": name.replace("{", f"{{{INSTANCE},").replace(",}", "}"),
            "values": values,
        }
        for name, values in (WELL | changed).items()
    ]


def query_of(alert: str, fires: bool, at: str) -> dict[str, object]:
    """Return the query that finds whether an alert fires at a time."""
    samples = [{"labels": "{}", "value": 1}] if fires else []
    expr = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    return {"expr": expr, "eval_time": at, "exp_samples": samples}


def alert_tests(rules: str) -> dict[str, object]:
    """Return the tests for `promtool test rules`, as JSON, which is YAML. In each, one alert fires,
    and in the first ones none does."""
    tests = [
        {
            "name": alert,
            "interval": "1m",
            "input_series": series_of(changed),
            "promql_expr_test": [query_of(alert, True, LATE if alert == SLOWEST else "100m")],
        }
        for alert, changed in (*CASES.items(), *FIRST_CASES.items())
    ]
    well = [
        {
            "name": name,
            "interval": "1m",
            "input_series": series_of(changed),
            "promql_expr_test": [query_of(each, False, LATE) for each in CASES],
        }
        for name, changed in ALSO_WELL.items()
    ]
    return {"rule_files": [rules], "evaluation_interval": "1m", "tests": [*well, *tests]}
