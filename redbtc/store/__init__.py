"""The ledger: keys and accounts, requests, stored objects. Their rows are in redbtc/usage.py, the
database that holds them is redbtc/store/database.py, and what requests cost is in redbtc/billing.

Nothing here knows HTTP: the gateway (redbtc_proxy.py) and the admin API (redbtc/admin) import
this and are not imported by it.
"""
