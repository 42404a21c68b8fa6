"""The costs of requests, the limits of spending, and the statements about both.

Rule 1. A cost is computed once. A settled row holds its cost and the id of its price. Prices,
payments and settled rows are only ever added (schema.sql has triggers against anything else), and
the transaction that adds them updates their sums by day.

Rule 2. Requests in parallel can't overspend. Before a request is sent upstream, its maximum cost
is held on its account and its key. Check and hold are one step on the event loop, without an
`await` in between. Holds exist only in memory, so none outlives its request or the process.

Rule 3. The payments and costs of an account are read from the database once, before this process
settles its first request, and then kept up to date in memory (totals.py): a cost counts before it
is committed. Payments are read again after each change, so that none counts twice.

billing.py      balances, budgets, holds and payments
prices.py, model_prices.py, model_patterns.py, price_table.py      which price applies, and the cost
price_changes.py, price_increases.py, price_texts.py              prices that are added
notices.py, key_notices.py, webhook_messages.py, webhook.py       what accounts and webhook are told
reports.py, statements.py, overviews.py, csv.py                   usage and costs, summed up
"""
