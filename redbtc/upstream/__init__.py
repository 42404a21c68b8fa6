"""The upstream side of HTTP: where requests are sent, and how.

`configured` has the upstreams of the settings, `upstreams` each of them and the choice among them;
`headers` says which headers pass between client and upstream. A request goes over HTTP/1.1 through
`transport`, which keeps the connections (`connection`; `kernel` has what it asks the kernel) and
uses `request` to serialize a request and `response` to parse a response. It goes over HTTP/2 and
through proxies with `httpx_transport`.
"""
