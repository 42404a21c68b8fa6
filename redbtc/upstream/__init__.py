"""The upstream side of HTTP: where requests are sent, and how.

A *member* is an upstream of the settings with one of its keys. `configured` has all members,
`upstreams` each of them. `candidates` chooses among them for a request; `health` keeps what is
known of each, and `change` is what the gateway is told when its state changes; `retry_after` reads
for how long an upstream wants to be left alone, and `failures` names the cause of a failure.

`headers` says which headers pass between client and upstream. A request goes over HTTP/1.1 through
`transport`, which keeps the connections (`connection`; `kernel` has what it asks the kernel) and
uses `request` to serialize a request and `response` to parse a response; `begun_body` is a response
of which the beginning has been read. It goes over HTTP/2 and through proxies with
`httpx_transport`. `connecting` opens connections, also for WebSockets, to what `addresses` has
found; `certificates` has whom they trust. `event_loop` lets libraries look names up likewise.
"""
