"""The meter watches an answer's bytes pass and finds the usage in them. It does no I/O: feed()
takes bytes as they came, cut anywhere, and returns those that may be sent on now.

Rule 1. Nothing waits that need not. What ends the answer for the client is held back until its
row is committed; a part of an event that could still turn out to end the answer (or to be the
usage chunk that the gateway asked for and takes out) is held until the event is whole. All else
passes.

Rule 2. Memory is bounded. An event or answer is kept whole for parsing up to KEEP bytes. Of a
larger one only the members that matter are kept (see scanner.py): usage, id, model, tier, and
what must be known of the items of its output. So nothing else in it can be so large that the usage
is unreadable.

Rule 3. Only a parser decides. A search for a few marks tells whether an event can matter; what it
says is then read from its JSON, at the place where it belongs, so that text cannot forge it.

Rule 4. What passes is counted as well, for the estimate of an answer that does not report usage.
"""
