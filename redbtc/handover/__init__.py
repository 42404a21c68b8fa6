"""Reload: a new process of the code and the settings that are on the disk takes over. No request is
refused, and answers have server.drain_seconds to finish.

    old process (successor.py)                new process (joining.py)
    starts it, offers its locks and listeners
                                              reads the settings, opens the ledger
    stops accepting, stops the requests that
    are not admitted (their connections go
    on in the new process), hands over its
    state
                                              serves: accepts, and goes on with the connections
    finishes what is in flight,               counts that in its limits,
    reports each end, ends with status 0      settles what it could not finish if it dies

Until the new process serves, any failure leaves the old one as it was. From then on, the new one
alone admits requests, so limits and holds are those of one process. Both write the ledger, in turns
(redbtc/store/turns.py). A connection goes on in the new process as soon as no response is under way
on it; its socket is passed on, so the client notices nothing.
"""
