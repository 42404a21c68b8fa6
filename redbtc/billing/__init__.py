"""Billing: what requests cost, who may spend how much, and the account given of it.

Rule 1. What has been billed is never worked out again. A settled row holds its cost and the price
it came from; prices, payments and settled rows are only ever added (schema.sql has triggers against
anything else), and their sums by day are kept in the transaction that adds them.

Rule 2. Nobody overspends by being quick. Before a request leaves, the most that it can cost is held
on its account and its key; check and hold are one step on the event loop, with nothing in between.
Holds live in memory alone, so none outlives its request or the process.

Rule 3. What an account has paid and spent is read from the database once, before its first request
is settled by this process, and kept along from then on: what waits for the next commit is spent
already. Payments are read again after each change, so that none counts twice.
"""
