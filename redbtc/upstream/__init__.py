"""The way to the upstreams.

`upstreams` has the configured upstreams and chooses among them; `headers` says which headers pass
between client and upstream. A request goes over HTTP/1.1 through `transport`, which keeps the
connections (`connection`; `kernel` has what it asks the kernel) and uses `request` to serialize a
request and `response` to parse a response, or over HTTP/2 and proxies through `httpx_transport`.
"""
