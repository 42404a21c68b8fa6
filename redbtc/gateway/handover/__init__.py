"""The state that a gateway tells the one that takes over from it.

When a new process takes over, the old one still finishes its requests. Both hold to the same
limits: `state.py` describes what the old one knows and the ledger does not, `telling.py` takes that
from the old process and reports each change of it, and `predecessors.py` keeps it up to date in the
new process. Amounts are reported a few hundredths of a second late, and a place, a hold or an
increase of a charge that has ended counts until then: so a limit is never exceeded.
"""
