"""Header fields by which a client asks for another protocol."""

HANDSHAKE = (
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade"
)
UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA",
    "TLS": b"Upgrade: TLS/1.0\r\nConnection: Upgrade",
    "websocket, nothing more": b"Connection: Upgrade\r\nUpgrade: websocket",
    "websocket, old": HANDSHAKE.replace(b"Version: 13", b"Version: 8"),
    "websocket, a bad key": HANDSHAKE.replace(b"==", b"="),
    "websocket, not alone": HANDSHAKE.replace(b"websocket\r", b"h2c, websocket\r"),
    "websocket, whole": HANDSHAKE,
    "empty": b"Connection: Upgrade\r\nUpgrade: ",
    "kept alive": b"Connection: keep-alive, Upgrade\r\nUpgrade: h2c",
    "no connection": b"Upgrade: h2c",
    "no upgrade": b"Connection: Upgrade",
    "two": b"Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: foo",
}
