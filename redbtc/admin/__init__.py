"""The admin API: /admin/v1/…, JSON in and out. All that people do goes through it.

The commands reach it over the Unix socket beside the database (mode 0600: who may open it could
open the database itself), on a stopped gateway within their own process; the dashboard's pages call
the same operations directly; a browser that is logged in reaches it on the public port, and with an
API key /admin/v1/me. So there is one place that says who may do what, and what is well formed.

An operation is a method of API with a decorator. What it takes is told by its parameters' names:
`account` and `key` are those of the path, looked up, and only ever the actor's own unless he is an
operator; `body` and `query` are read strictly into their types; others are parts of the path.
"""
