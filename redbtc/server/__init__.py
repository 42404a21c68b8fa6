"""The client's side of HTTP, as an ASGI server: uvicorn's, with a protocol of its own.

`listening` opens sockets and starts servers, `unix_socket` the one for commands. On each connection
`protocol` joins `stream` (bytes and flow control), `connections` (states, deadlines, their number),
`head` and `framing` (reading a request) and `cycle` (one request for the app); a WebSocket is taken
over by `websocket_protocol`. `cors` and `guard` are the first apps that a request meets; `asgi` has
what all apps need.
"""
