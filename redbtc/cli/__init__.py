"""The commands. They call the admin API: over the Unix socket beside the database if a gateway is
running, otherwise in their own process. So no command changes a database that a running gateway has
open."""
