"""The commands, and how they reach the admin API: on a running gateway over the Unix socket beside
its database, on a stopped one through the same app within the command's own process. So nothing is
ever written behind a running gateway's back.
"""
