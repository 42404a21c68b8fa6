"""The log of the bodies of requests whose owners want them kept.

It is a database of its own, `request_log.db` in the folder of the ledger, which is made when the
first body is stored. The event loop puts the parts of bodies into a queue as they pass
(recording.py); a thread takes them out, compresses them and writes them (worker.py, states.py).
The queue is bounded: while the disk is too slow or fails, parts are dropped and counted, and no
request waits. The same thread does all that is asked of the log, so that no connection of this
process is ever a reader that keeps erased content in the file (file.py, erasing.py). Where another
program is such a reader, the file is replaced (replacing.py).
"""

from redbtc.store.request_log.log import RequestLog
from redbtc.store.request_log.recording import REQUEST, RESPONSE, Recording
from redbtc.store.request_log.results import LoggedRequest, Purged

__all__ = ["REQUEST", "RESPONSE", "LoggedRequest", "Purged", "Recording", "RequestLog"]
