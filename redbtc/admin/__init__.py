"""Serve the admin API: /admin/v1/…, JSON in and out. Every change that people make goes through
it.

Commands reach it over the Unix socket beside the database (mode 0600: a user who may open the
socket could open the database itself), or in their own process if no gateway is running. The
dashboard's pages call the same operations directly. On the public port, a browser that is logged in
may use all of /admin/v1, and an API key only /admin/v1/me. So one place decides which role may do
what, and what is well formed.

An operation is a method of API, in one of the files api_*.py by its subject. The table in api.py
declares for each one its HTTP method, its paths, the lowest role that may perform it, the types of
its input and its answer, and its handler, which is the method. HTTP, the pages and openapi.json are
made from that table.

A handler takes the actor first. Its input comes next, if it has one: the query or the body, read
strictly into its type. The variables of the path follow, by their names. It looks up the account,
key or user that a path or a query names with the methods of Access, which find only what the actor
may know of."""
