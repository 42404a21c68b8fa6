"""Pages for operators and for the members of accounts, rendered by the server.

A page is a template with the results of operations of the admin API, and a form on it is one
operation. So the API decides who may do what and what is valid; a page contains no SQL and no rules
of its own. Names and texts that users have entered are untrusted: the templates escape them, and
the Content-Security-Policy lets no script, style or image load that is not the gateway's own.

Pages are drawn one at a time, in slices of a quarter of a millisecond between which the event loop
does its other work. However long a page is, it does not hold up the requests that are forwarded.

`app.py` has the routes: each page with its template, its forms and the role that it requires.
"""
