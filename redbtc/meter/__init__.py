"""Watch the bytes of an answer pass, and find the usage in them: the meter.

It does no I/O: `feed` takes bytes as they arrive, cut anywhere, and returns those that may be sent
on now. Begin reading with meters.py (what a meter is), streams.py (the meter of server-sent events)
and report.py (what it finds).

Rule 1. Nothing waits without need. The bytes that end the answer for the client are held back until
its row is committed. A part of an event is held back until the event is whole, if the event could
still end the answer or be the usage chunk that the gateway asked for and takes out. Everything else
passes.

Rule 2. Memory is bounded. An answer or an event is kept whole for parsing up to MAX_WHOLE bytes. Of
a larger one only the members that matter are kept (scanner.py): usage, id, model, tier, and some
members of its output items. So nothing else in it can be so large that the usage becomes
unreadable.

Rule 3. Only a parser decides. A search for a few marks tells whether an event can matter. What the
event reports is then read from its JSON, at the place where it belongs, so that text can't forge
it.

Rule 4. The text that passes is counted, for the estimate of an answer that does not report its
usage.
"""
