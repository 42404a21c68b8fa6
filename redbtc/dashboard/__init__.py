"""The dashboard: pages for operators and for the members of accounts, drawn by the server.

A page is a template and what operations of the admin API answer; a form is one operation. So the
API says who may do what and what is well formed, and a page knows no SQL and no rule of its own.
All that people have named is somebody else's text: the templates escape it, and no script, style or
picture that is not the gateway's own is ever loaded (Content-Security-Policy).

Pages are drawn one at a time and in slices of a quarter of a millisecond, with the event loop's
other work between them: what is being forwarded meanwhile doesn't wait for a page, whatever there
is to be seen on it.
"""
