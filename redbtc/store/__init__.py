"""The ledger's database, and what is kept in it: accounts, keys, requests, stored objects.

`database.Store` opens it. The engine below (`writer.py`, `entries.py`, `commits.py`, `readers.py`)
knows no table but the heartbeat; the other modules know the tables. Rows of requests are plain data
in redbtc/usage.py, and what requests cost is in redbtc/billing. Nothing here knows HTTP.
"""
