"""Limit how many requests are in flight, how many requests and tokens there are per minute, and how
much memory bodies take. All times are by the monotonic clock.

A request is charged on the rates of its key, its account and the whole gateway, needs memory for
its body, and needs a place in each of the three. The checks that cost the least come first:

1. the request rates, when only the head has been read;
2. memory, before each part of the body is read;
3. the token rates, and then places, for which requests wait in turn.

Key, account and gateway always come in this order, so that no two requests wait for each other. A
request that waits for a place of the gateway already holds one of its account's, so that no account
can fill the queue. The memory is given back once the request has its places: from then on they
limit it.
"""
